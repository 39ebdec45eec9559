"""PACT (https://arxiv.org/abs/2504.08966, CVPR 2025): unimportant tokens leave, near ones merge, without attention.

score_i = |h_i|_2 mean over heads of softmax(q k^T / sqrt(d))_i, with q the mean of the queries of all tokens up to the
last visual one, over their keys, both before rotation, in the layer ahead. Of the best floor(0.55 N) some become
centres: by falling density sum_j exp(-(d_ij / 2)^2), d = 1 - cosine of rotated keys, all heads as one, each that has no
centre within 0.21. Every token within 1.5 * 0.21 of its nearest centre, unimportant ones too, joins it by the mean; the
others leave. Attention adds log(size) to the logits of a centre's key.

Rule: orailix/PACT@cf9a0c9, `configs/pact.json`, before layer 4. How many stay follows from the cutoff. Deviations:
equally dense tokens go by the lower index, not by a sort routine; where earlier stages merged, means and sizes count
their sizes; one token at least is important.
"""

import torch
from torch import Tensor

from prunekit import Keys, ModelShape, Owners, PromptTokens, Rows, Selection, Site, Sites, hookimpl, strategy
from prunekit.ops import cosine, density_cutoff, precise, top_k_mask


def _up_to_the_image(prompt: PromptTokens) -> Tensor:
    """All tokens but the text behind the last visual one, bool (B, S)."""
    return prompt.valid & ~prompt.after


@strategy(
    paper="2504.08966",
    code="orailix/PACT@cf9a0c9",
    sites=Sites(default=lambda layers: Site(layers // 7), encoder=False, points=("before", "after")),
    inputs={
        "attention": Rows(layer="next", queries=_up_to_the_image, pooled=True, rope=False, domain="queries"),
        "keys": Keys(layer="next"),
    },
    keep="refused",
    per_sample=True,
)
class PACT:
    """Keep centres of clusters of important tokens, with near tokens merged into them.

    important: the fraction of tokens that may be centres. cutoff: cosine distance within which there is one centre.
    reach: how far others may be from theirs, as a multiple of `cutoff`. proportional: centres count in attention for as
    many as they stand for; flash attention needs false.
    """

    important: float = 0.55
    cutoff: float = 0.21
    reach: float = 1.5
    proportional: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.important <= 1:
            raise ValueError("important: is a fraction, above 0 and at most 1")
        if not 0 <= self.cutoff <= 2:
            raise ValueError("cutoff: is a cosine distance, from 0 to 2")
        if self.reach < 1:
            raise ValueError("reach: is at least 1")

    @hookimpl
    def select_tokens(self, attention: Tensor, keys: Tensor, hidden: Tensor, sizes: Tensor) -> Selection:
        """Bool (V,), owners and sizes, from (V,), keys (V, D) and states (V, H)."""
        scores = precise(attention) * precise(hidden).norm(dim=-1)
        important = top_k_mask(scores, max(int(len(scores) * self.important), 1))
        owner = density_cutoff(1 - cosine(keys), self.cutoff, self.reach, core=important)
        keep = owner == torch.arange(len(owner), device=owner.device)
        sizes = precise(sizes).masked_fill(owner < 0, 0.0)
        totals = torch.zeros_like(sizes).index_add(0, owner.clamp(min=0), sizes)
        sized = torch.where(keep, totals, 1.0) if self.proportional else None
        return Selection(keep, Owners(owner, "size_mean"), sized)

    @hookimpl
    def flops(self, shape: ModelShape, text: int, visual: int) -> int:
        """Queries and keys of the layer ahead, one row, norms, and the cosines of keys."""
        tokens, width = text + visual, shape.kv_width // 2
        return shape.look_flops(tokens) + shape.row_flops(1, tokens) + 2 * visual * (shape.hidden + visual * width)
