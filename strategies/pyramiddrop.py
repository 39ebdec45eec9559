"""PyramidDrop (https://arxiv.org/abs/2410.17247, CVPR 2025): visual tokens leave in stages, by a look ahead.

score_i = mean over heads of softmax(q K^T / sqrt(d))_i, of the last prompt token, with the norm, projections and
rotation of layer K applied to what enters it; by default 1/2, 1/4, 1/8 of the original tokens stay after 1/4, 1/2, 3/4
of the layers (8, 16, 24 of 32).

Rule: Cooperx521/PyramidDrop@6444f30 at inference. Deviations: positions stay, the authors close them up after each
stage (`positions: renumber`); counts round half up, theirs are truncated; no sequence is truncated to a tokenizer's
length.
"""

from torch import Tensor

from prunekit import ModelShape, Rows, Site, Sites, hookimpl, strategy


@strategy(
    paper="2410.17247",
    code="Cooperx521/PyramidDrop@6444f30",
    sites=Sites(encoder=False, points=("before", "after")),
    inputs={"attention": Rows(layer="next")},
    schedule=lambda self, layers: {Site(layers * quarter // 4): 0.5**quarter for quarter in (1, 2, 3)},
)
class PyramidDrop:
    """Keep the visual tokens that the last prompt token would attend to most in the layer ahead."""

    @hookimpl
    def score_tokens(self, attention: Tensor) -> Tensor:
        """The attention itself, (B, V)."""
        return attention

    @hookimpl
    def flops(self, shape: ModelShape, text: int, visual: int) -> int:
        """Queries and keys of the layer ahead, and one row."""
        return shape.look_flops(text + visual) + shape.row_flops(1, text + visual)
