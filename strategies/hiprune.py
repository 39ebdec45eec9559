"""HiPrune (https://arxiv.org/abs/2508.00553): anchors of a middle block, their neighbours, and what the last one sees.

Rule: Danielement321/HiPrune@6e83a12. With a_l the attention that a token gets in block l of the tower, the mean over
heads and all queries, CLS among them: of T tokens of a crop, the round(T * alpha / 5) with the largest a at the object
layer are anchors; kept are anchors, the tokens at raster index i - 1, i + 1, i - columns and i + columns of each (as in
the authors' code, so that the ends of rows are neighbours), and by a of the block of the image features as many others
as are left. Blocks are counted from 1 here: `object_layer: 9` is block 8, and the default of a tower of 24 blocks.
Deviations: T is a crop's share of the count, in proportion to its tokens and exactly. Neighbours that an earlier stage
dropped are missing; where anchors and neighbours are more than T, anchors come first.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from prunekit import EncoderRows, ModelShape, hookimpl, strategy
from prunekit.ops import crop_quotas, top_k_mask


def _third(blocks: int) -> int:
    """Block 8 of 24."""
    return blocks // 3


@strategy(
    paper="2508.00553",
    code="Danielement321/HiPrune@6e83a12",
    per_sample=True,
    inputs=lambda self: {
        "encoder_attention": (EncoderRows(layer=self._object_block(), query="mean"), EncoderRows(query="mean"))
    },
)
class HiPrune:
    """Keep anchors and their neighbours, a share `alpha` of all, and what is attended to most at the tower's end.

    object_layer: counted from 1; null: behind a third of the tower's blocks, of 24 the paper's 9.
    """

    alpha: float = 0.1
    object_layer: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha: is {self.alpha}; it is a share from 0 to 1")
        if self.object_layer is not None and self.object_layer < 1:
            raise ValueError(f"object_layer: is {self.object_layer}; blocks are counted from 1 here")

    @hookimpl
    def select_tokens(
        self, encoder_attention: tuple[Tensor, Tensor], coords: Tensor, frames: Tensor, count: int
    ) -> Tensor:
        """Bool (V,) from the attention received at the object layer and at the end, float (V,) each."""
        middle, late = encoder_attention
        groups, quota = crop_quotas(coords, frames, count)
        keep = torch.zeros_like(groups, dtype=torch.bool)
        for crop, wanted in enumerate(quota.tolist()):
            members = (groups == crop).nonzero()[:, 0]
            anchor = top_k_mask(middle[members], round(wanted * self.alpha / 5))
            near = torch.isin(*self._places(coords[members], anchor))
            # Attention is at most 1, so that anchors come before neighbours and these before all others.
            keep[members] = top_k_mask(late[members].double() + 2.0 * near + 2.0 * anchor, wanted)
        return keep

    def _object_block(self) -> int | Callable[[int], int]:
        return _third if self.object_layer is None else self.object_layer - 1

    def _places(self, coords: Tensor, anchor: Tensor) -> tuple[Tensor, Tensor]:
        """Raster indices of a crop's tokens, and those of the anchors and their neighbours."""
        _, row, column, rows, columns = coords.unbind(1)
        place = row * columns + column
        steps = torch.stack([torch.zeros_like(columns), -torch.ones_like(columns), torch.ones_like(columns)])
        around = place + torch.cat([steps, -columns[None], columns[None]])
        return place, around.clamp(min=0).minimum(rows * columns - 1)[:, anchor].flatten()

    @hookimpl
    def flops(self, shape: ModelShape, text: int, visual: int) -> int:
        """The products of two attention maps of a tower as wide as the decoder."""
        return 4 * visual**2 * shape.hidden
