"""LRCP (https://arxiv.org/abs/2605.15621): what a low-rank picture of the tokens explains worst stays.

Rule: from the paper and a port of it to a serving engine; the authors' code was not found. With X the visual tokens
minus their mean and P the projection onto its `rank` leading right singular vectors, the score is |x - P x|^2. Every
dropped token joins the kept one with the most similar cosine, and groups become their mean: (kept + sum of joined) /
(1 + number of joined). The paper has rank 4 for LLaVA and 8 for Qwen.
Deviations, where the sources leave it open: the score is of centred tokens, similarity of the tokens as they are, and
the mean is plain. The port's halving of kept tokens that nobody joins is not repeated. Residuals below rounding count
as 0, so that the lower index decides. All images of a sample are one matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prunekit import ModelShape, Owners, Selection, hookimpl, strategy
from prunekit.ops import cosine, nearest_kept, precise, top_k_mask


@strategy(paper="2605.15621", per_sample=True)
class LRCP:
    """Keep the tokens farthest from the leading `rank` directions of all, and merge the others into them."""

    rank: int = 4

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank: is {self.rank}; it is a number of directions from 1")

    @hookimpl
    def select_tokens(self, hidden: Tensor, count: int) -> Selection:
        """Bool (V,) and who joins whom, from the tokens' states, float (V, H)."""
        tokens = precise(hidden)
        centred = tokens - tokens.mean(0)
        leading = torch.linalg.svd(centred, full_matrices=False).Vh[: self.rank]
        residual = (centred - centred @ leading.T @ leading).square().sum(-1)
        rounding = tokens.square().sum(-1).amax() * (64 * torch.finfo(tokens.dtype).eps) ** 2
        keep = top_k_mask(residual.masked_fill(residual <= rounding, 0.0), count)
        return Selection(keep, Owners(nearest_kept(cosine(tokens), keep)))

    @hookimpl
    def flops(self, shape: ModelShape, text: int, visual: int) -> int:
        """A singular value decomposition of V x H by its usual count, 6 H V^2 + 20 V^3, and all cosines."""
        return visual**2 * (8 * shape.hidden + 20 * visual)
