"""HoloV (https://arxiv.org/abs/2510.02912, NeurIPS 2025): every part of the image gets tokens by its content.

Rule, for each crop or frame with T tokens to keep: its raster is cut into `chunks` runs of equal length (the first ones
a token longer). Within a run of n tokens S = cosine of the projected tokens with 0 on the diagonal, m_i = sum_j S_ij /
(n - 1), v_i = sum_j (S_ij - m_i)^2 / (n - 1); with b = 1000 * CLS attention (mean over heads, block whose output the
projector gets) a token scores b_i + 0.09 v_i mean b / (mean v + 1e-6), means of its run. Runs share T in proportion to
the mean of their scores, rounded down, what is left going to the largest means; in each run the largest CLS attention
stays. (The mean of that second term is 0.09 mean b wherever v is not tiny: in the authors' code, too, variety hardly
counts.)

Studied: obananas/HoloV@1d2e65e (LLaVA). Deviations: what a run cannot hold goes to the others, where the authors' code
appends zero vectors; tokens keep raster order; a run's only token has v = 0; the "refetching" of the paper is not in
the code. Runs are of the complete crop, also where an earlier stage has thinned it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prunekit import ModelShape, hookimpl, strategy
from prunekit.ops import cosine, crop_quotas, group_members, group_sizes, group_top_k, quotas


@strategy(paper="2510.02912", code="obananas/HoloV@1d2e65e", per_sample=True)
class HoloV:
    """Keep what CLS attends to, in each part of the image as much as its attention and variety deserve.

    chunks: how many parts a crop has. variety: the weight of the variance.
    """

    chunks: int = 16
    variety: float = 0.09

    def __post_init__(self) -> None:
        if self.chunks < 1:
            raise ValueError("chunks: there is at least one")

    @hookimpl
    def select_tokens(
        self, encoder_attention: Tensor, hidden: Tensor, coords: Tensor, frames: Tensor, count: int
    ) -> Tensor:
        """Bool (V,) with exactly `count` True."""
        groups, shares = crop_quotas(coords, frames, count)
        keep = torch.zeros_like(groups, dtype=torch.bool)
        for tokens, share in zip(group_members(groups, len(shares)), shares.tolist(), strict=True):
            attention, parts = encoder_attention[tokens], self._parts(coords[tokens])
            sizes = group_sizes(parts, self.chunks)
            scores = self._scores(attention.double(), cosine(hidden[tokens]).double(), parts, sizes)
            keep[tokens] = group_top_k(attention, parts, quotas(scores, share, sizes, remainder="weight"))
        return keep

    def _parts(self, coords: Tensor) -> Tensor:
        """The number of each token's run, int64 (n,)."""
        total, place = coords[:, 3] * coords[:, 4], coords[:, 1] * coords[:, 4] + coords[:, 2]
        size, longer = total // self.chunks, total % self.chunks
        border = longer * (size + 1)
        late = longer + (place - border) // size.clamp(min=1)
        return torch.where(place < border, place // (size + 1), late).clamp(min=0)

    def _scores(self, attention: Tensor, similarity: Tensor, parts: Tensor, sizes: Tensor) -> Tensor:
        """Of each run, float64 (chunks,)."""
        same = parts[:, None] == parts
        similarity = (similarity * same).fill_diagonal_(0.0)
        others = (sizes[parts] - 1).clamp(min=1)[:, None]
        mean = similarity.sum(1, keepdim=True) / others
        variance = ((similarity - mean).square() * same / others).sum(1) * (sizes[parts] > 1)

        def of_runs(values: Tensor) -> Tensor:
            return values.new_zeros(self.chunks).index_add_(0, parts, values) / sizes.clamp(min=1)

        loud, varied = of_runs(1000 * attention), of_runs(variance)
        return loud + self.variety * varied * loud / (varied + 1e-6)

    @hookimpl
    def flops(self, shape: ModelShape, text: int, visual: int) -> int:
        """One row of attention, and cosines within each crop."""
        width, crop = shape.tower.width if shape.tower else 0, min(visual, shape.visual_tokens or visual)
        return 2 * visual * (width + crop * shape.hidden)
