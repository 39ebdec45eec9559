"""HiRED (https://arxiv.org/abs/2408.10945, AAAI 2025): tiles get tokens by what the CLS of the whole image attends to.

Rule, for an image of a whole view with N tokens and tiles, with T tokens to keep: the whole gets min(floor(alpha T),
N); its floor((1 - alpha) N) tokens with the largest sum over heads of the CLS attention in tower block 0 are marked,
and the tiles share the rest in proportion to the marks that lie on them. In every view the tokens with the largest CLS
attention (sum over heads) of the tower block whose output the projector gets stay. An image without tiles is one view.

Studied: hasanar1f/HiRED@502d6dd. `grid: geometric` (the paper) counts marks by where tiles really are, and gives
exactly T. `grid: official` (the code) counts them on contiguous stripes of the whole view's raster, rounds quotas down
and gives the remainder to nobody, so that up to a token a tile is missing. Deviations: the authors' packing of tiles
that are no square, which loses tokens, is not reproduced; newlines, which they leave out, go first; several images, and
crops that are no tiles, share `keep` in proportion to their tokens.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from prunekit import EncoderRows, ModelShape, hookimpl, strategy
from prunekit.ops import crop_quotas, group_members, group_sizes, group_top_k, quotas, tile_of, top_k_mask


@strategy(
    paper="2408.10945",
    code="hasanar1f/HiRED@502d6dd",
    inputs={"encoder_attention": (EncoderRows(0, heads="sum"), EncoderRows(heads="sum"))},
    per_sample=True,
)
class HiRED:
    """Keep what CLS attends to, in each tile a number that follows from early attention of the whole image.

    alpha: the part of the tokens that the whole image gets. grid: where marks are counted, see above.
    """

    alpha: float = 0.5
    grid: Literal["geometric", "official"] = "geometric"

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError("alpha: is a part, from 0 to 1")

    @hookimpl
    def select_tokens(
        self, encoder_attention: tuple[Tensor, Tensor], coords: Tensor, frames: Tensor, places: Tensor, count: int
    ) -> Tensor:
        """Bool (V,) with `count` True, or with `grid: official` perhaps some fewer."""
        first, late = encoder_attention
        groups, sizes = crop_quotas(coords, frames, len(coords))
        images, shares = crop_quotas(coords, torch.zeros_like(frames), count)
        under, quota = tile_of(coords, places, groups), torch.zeros_like(sizes)
        for image, share in zip(group_members(images, len(shares)), shares.tolist(), strict=True):
            views = group_sizes(groups[image], len(sizes))
            seen = image[under[image] >= 0]
            if not len(seen):
                quota += quotas(views.double(), share, views)
                continue
            own = groups[seen[0]]
            whole, tiles = image[groups[image] == own], views.index_fill(0, own, 0)
            quota += self._quotas(first[whole], coords[whole], under[whole], tiles, own, share)
        return group_top_k(late, groups, quota)

    def _quotas(self, first: Tensor, coords: Tensor, under: Tensor, tiles: Tensor, whole: Tensor, count: int) -> Tensor:
        """Of one image, int64 (G,). under: the tile below each token of the whole. tiles: int64 (G,), their sizes."""
        room, own = int(tiles.sum()), math.floor(count * self.alpha + 1e-9)
        own = min(own if self.grid == "official" else max(own, count - room), len(first))
        marked = top_k_mask(first, math.floor(len(first) * (1 - self.alpha) + 1e-9))
        if self.grid == "official":
            there = tiles.nonzero()[:, 0]
            place = coords[:, 1] * coords[:, 4] + coords[:, 2]
            under = there[place * len(there) // (coords[:, 3] * coords[:, 4])]
        hits = group_sizes(under, len(tiles), marked)
        if self.grid == "official":
            rest = min(count - own, room)
            quota = (hits / hits.sum().clamp(min=1) * rest).long().minimum(tiles)
        else:
            quota = quotas(hits.double(), count - own, tiles)
        return quota.index_fill(0, whole, own)

    @hookimpl
    def flops(self, shape: ModelShape, text: int, visual: int) -> int:
        """Two rows of attention."""
        return 4 * visual * (shape.tower.width if shape.tower else 0)
