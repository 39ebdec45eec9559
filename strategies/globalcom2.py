"""GlobalCom2 (https://arxiv.org/abs/2501.05179, AAAI 2026): the whole image says how much of each tile stays, and what.

Rule, with g the CLS row of the last tower block (mean over heads of the logits before softmax): the whole view keeps
the floor(base N) largest of its N. Tile t with n_t tokens keeps the floor(r_t n_t) largest of local / |local| + global
/ |global|, where local are its own g, global those of the whole view, resized bilinearly to the joined tiles, and r_t =
min(1, base (1 + s_t - mean s)), s = softmax(sum of the whole view's g on t / 10). Newlines always stay.

Studied: xuyang-liu16/GlobalCom2@96b2d00. Deviations: tokens keep raster order, also those of the whole view; padding is
gone before, so what the authors' code does with indices and newlines of padding does not come up; a token of the whole
view counts for the tile on which its centre really lies, which differs from equal cells where padding takes away a part
of three or more tiles. With a budget, newlines come first and views share the rest in the proportion of the ratios,
rounded so that it is used up; `base` then says nothing. Where an earlier stage has dropped tokens of the whole view,
their g is the mean of the others; without whole view or tiles every view has the ratio `base` and its own g.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from prunekit import EncoderRows, ModelShape, hookimpl, strategy
from prunekit.ops import crop_quotas, group_sizes, group_top_k, quotas, tile_of


@strategy(
    paper="2501.05179",
    code="xuyang-liu16/GlobalCom2@96b2d00",
    inputs={"encoder_attention": EncoderRows(layer=-1, domain="logits")},
    keep="optional",
    per_sample=True,
)
class GlobalCom2:
    """Keep of the whole image and of each tile what CLS looks at, more of tiles on which the whole looks.

    base: the part of each view that stays; used where no budget is given.
    """

    base: float = 0.25

    def __post_init__(self) -> None:
        if not 0 < self.base <= 1:
            raise ValueError("base: is a part, above 0 and up to 1")

    @hookimpl
    def select_tokens(
        self, encoder_attention: Tensor, coords: Tensor, frames: Tensor, places: Tensor, count: int | None
    ) -> Tensor:
        """Bool (V,): `count` True, or as many as `base` says, and newlines."""
        groups, sizes = crop_quotas(coords, frames, len(coords))
        score, shows = encoder_attention.clone(), coords[:, 1] >= 0
        ratio = torch.ones(len(sizes), dtype=torch.float64, device=score.device)
        under = tile_of(coords, places, groups)
        for image in torch.unique(coords[under >= 0, 0]).tolist():
            inside = coords[:, 0] == image
            whole = inside & (groups == groups[(under >= 0) & inside][0])
            joined = inside & shows & ~whole
            tiles = torch.unique(groups[joined])
            seen = whole & (under >= 0)
            looked = torch.zeros_like(ratio).index_add_(0, under[seen], score[seen].double())[tiles]
            share = (looked / 10).softmax(0)
            ratio[tiles] = 1 + share - share.mean()
            glance = torch.zeros_like(score)
            glance[joined] = _resized(score[whole], coords[whole], places[joined])
            for tile in tiles:
                here = groups == tile
                score[here] = normalize(score[here], dim=0) + normalize(glance[here], dim=0)
        newlines = ~shows if count is None else ~shows & ((~shows).cumsum(0) <= count)
        room = group_sizes(groups, len(sizes), shows)
        if count is None:
            quota = (room * (self.base * ratio).clamp(max=1.0) + 1e-9).long()
        else:
            quota = quotas(room * ratio, count - int(newlines.sum()), room)
        return group_top_k(score, groups, quota) | newlines

    @hookimpl
    def flops(self, shape: ModelShape, text: int, visual: int) -> int:
        """One row of attention, and about twenty operations a token to resize and scale it."""
        return visual * (2 * (shape.tower.width if shape.tower else 0) + 20)


def _resized(logits: Tensor, coords: Tensor, places: Tensor) -> Tensor:
    """The logits (n,) of a whole view at (m, 4) places of its joined tiles, (m,)."""
    rows, columns = coords[0, 3:].tolist()
    grid = logits.mean().expand(rows * columns).clone()
    grid[coords[:, 1] * columns + coords[:, 2]] = logits
    size = tuple(places[0, 2:].tolist())
    wide = interpolate(grid.view(1, 1, rows, columns), size, mode="bilinear", align_corners=False)[0, 0]
    return wide[places[:, 0], places[:, 1]]
