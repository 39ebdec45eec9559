"""SCOPE (https://arxiv.org/abs/2510.24214): the subset that covers all tokens, salient ones first.

Rule: kinredon/SCOPE@6bf7306. With s_ij the cosine of the tower's features i and j, and c_i the best s_ij of the chosen
j, 0 at first, always the token with the largest a_j^alpha * sum_i max(0, s_ij - c_i) is taken; a_j is the attention
that the CLS token gives it, summed over heads. Every crop by itself.
Deviations: the count is split over crops and images in proportion to their tokens and exactly, where the authors give
each crop the truncated even share. Newlines stay only where everything does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prunekit import EncoderRows, Features, ModelShape, hookimpl, strategy
from prunekit.ops import cosine, coverage, crop_quotas, precise


@strategy(
    paper="2510.24214",
    code="kinredon/SCOPE@6bf7306",
    per_sample=True,
    inputs={"encoder_attention": EncoderRows(heads="sum"), "features": Features()},
)
class Scope:
    """Repeatedly keep the token that adds most to the coverage of its crop, times its saliency to the `alpha`."""

    alpha: float = 1.0

    def __post_init__(self) -> None:
        if not self.alpha >= 0:
            raise ValueError(f"alpha: is {self.alpha}; it is a power from 0")

    @hookimpl
    def select_tokens(
        self, encoder_attention: Tensor, features: Tensor, coords: Tensor, frames: Tensor, count: int
    ) -> Tensor:
        """Bool (V,) from the CLS token's attention, float (V,), and the tower's features, float (V, W)."""
        saliency = precise(encoder_attention) ** self.alpha
        groups, quota = crop_quotas(coords, frames, count)
        keep = torch.zeros_like(groups, dtype=torch.bool)
        for crop, wanted in enumerate(quota.tolist()):
            members = (groups == crop).nonzero()[:, 0]
            chosen = coverage(cosine(features[members]), wanted, saliency=saliency[members])
            keep[members[chosen]] = True
        return keep

    @hookimpl
    def flops(self, shape: ModelShape, text: int, visual: int) -> int:
        """At most: cosines of features as wide as the decoder, and a step for every token of one crop."""
        return 2 * visual**2 * shape.hidden + 3 * visual**3
