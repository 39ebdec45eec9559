"""FastV (https://arxiv.org/abs/2403.06764, ECCV 2024): an image is worth half the tokens after layer 2.

score_i = mean over heads of softmax(q K^T / sqrt(d))_i, of the last prompt token in layer K - 1; the best stay from
layer K on.

Rule: pkunlp-icler/FastV@d165972, at original positions. Deviations: of a batch every row is ranked by its own
attention, the authors take that of row 0; counts round half up, theirs are truncated. `keep` is what the cut leaves, as
the paper's R; where a table means the average over layers, write `budget: {layer_mean: 0.333}` for the pipeline.
"""

from typing import Literal

from torch import Tensor

from prunekit import ModelShape, Rows, Site, Sites, hookimpl, strategy


@strategy(
    paper="2403.06764",
    code="pkunlp-icler/FastV@d165972",
    sites=Sites(default=Site(2), encoder=False, lowest=1),
    inputs=lambda self: {"attention": Rows(layer="previous", rope=self.rope, domain=self.domain)},
)
class FastV:
    """Keep the visual tokens that the last prompt token attends to most in the layer before `at`.

    rope: false ranks by queries and keys before rotation, which takes the preference for the bottom of the image away
    (FEATHER). domain: what a row is normalised over: all keys, the visual ones alone, or `logits`, not at all.
    """

    rope: bool = True
    domain: Literal["softmax", "visual", "logits"] = "softmax"

    @hookimpl
    def score_tokens(self, attention: Tensor) -> Tensor:
        """The attention itself, (B, V)."""
        return attention

    @hookimpl
    def flops(self, shape: ModelShape, text: int, visual: int) -> int:
        """One row; without rotation, queries and keys once more."""
        tokens = text + visual
        return shape.row_flops(1, tokens) + (0 if self.rope else shape.look_flops(tokens))
