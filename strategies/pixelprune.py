"""PixelPrune (https://arxiv.org/abs/2604.00886, rule of OPPO-Mente-Lab/PixelPrune@a870e31)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from prunekit import PIXELS, Sites, hookimpl, strategy

Similar = Callable[[Tensor, Tensor], Tensor]


@strategy(
    paper="2604.00886",
    code="OPPO-Mente-Lab/PixelPrune@a870e31",
    sites=Sites(default=PIXELS, encoder=False, decoder=False, pixels=True),
    keep="refused",
    per_sample=True,
)
class PixelPrune:
    """Before the tower, drop what the squares of pixels to the left, above and between them already tell.

    Of a square with A to its left, B above and C between the two, the prediction is B where C is like A and not like B,
    else A; in the first row it is A, in the first column B. A square that is not like its prediction stays, as does the
    first one. How many stay is the image's own: few of a document, nearly all of a photograph. Only still images lose
    squares: videos pass, as in the released code.
    tau: two squares are alike if their distance is at most this, of pixels between 0 and 1. distance: `max`, the
    largest difference of a value; `mae`, the mean; `rmse`, the root of the mean square. anchored: above tau 0, a square
    is compared with what is left to see of its neighbours, so that small steps cannot add up. std: the processor's
    `image_std`, which the pixels were divided by; 0.5 with Qwen3-VL and later.
    """

    tau: float = 0.0
    distance: Literal["max", "mae", "rmse"] = "max"
    anchored: bool = True
    std: float = 0.5

    def __post_init__(self) -> None:
        if self.tau < 0:
            raise ValueError(f"tau: {self.tau} is below 0")
        if self.std <= 0:
            raise ValueError(f"std: {self.std} is not above 0")

    @hookimpl
    def select_tokens(self, patches: Tensor, coords: Tensor, frames: Tensor) -> Tensor:
        """The squares that stay: bool (V,)."""
        keep = torch.ones(len(patches), dtype=torch.bool, device=patches.device)
        if len(patches) == 0 or int(frames.max()) > 0:
            return keep
        squares = patches[:, 0].flatten(1) * self.std  # of the frames that are taken together all are one
        table = _table(coords)
        if self.tau > 0 and self.anchored:
            return self._in_order(squares, table)
        left, above, corner = _shifted(table, 0, 1), _shifted(table, 1, 0), _shifted(table, 1, 1)

        def alike(one: Tensor, other: Tensor) -> Tensor:
            there = (one >= 0) & (other >= 0)
            return there & self._alike(squares[one.clamp(min=0)], squares[other.clamp(min=0)])

        upwards = (alike(corner, left) & ~alike(corner, above)) | (left < 0)
        told = alike(table, torch.where(upwards, above, left))
        keep[table[table >= 0]] = ~told[table >= 0]
        return keep

    def _alike(self, one: Tensor, other: Tensor) -> Tensor:
        """Bool (...), of squares (..., values)."""
        apart = (one - other).abs()
        if self.distance == "max":
            return apart.amax(-1) <= self.tau
        return (apart.mean(-1) if self.distance == "mae" else apart.square().mean(-1).sqrt()) <= self.tau

    def _in_order(self, squares: Tensor, table: Tensor) -> Tensor:
        """Row by row, where a square that leaves is from then on what it was predicted to be."""
        device, seen, places = squares.device, squares.cpu().clone(), table.tolist()
        keep = torch.ones(len(squares), dtype=torch.bool)

        def at(row: int, column: int) -> int:
            return places[row][column] if row >= 0 and column >= 0 else -1

        def alike(one: int, other: int) -> bool:
            return one >= 0 and other >= 0 and bool(self._alike(seen[one], seen[other]))

        for row, line in enumerate(places):
            for column, own in enumerate(line):
                left, above, corner = at(row, column - 1), at(row - 1, column), at(row - 1, column - 1)
                upwards = left < 0 or (alike(corner, left) and not alike(corner, above))
                told = above if upwards else left
                if own >= 0 and alike(own, told):
                    keep[own], seen[own] = False, seen[told]
        return keep.to(device)


def _table(coords: Tensor) -> Tensor:
    """Which square stands in each row and column, int64 (rows, columns); -1 where an earlier stage left a hole."""
    rows, columns = coords[0, 3:].tolist()
    table = torch.full((rows, columns), -1, dtype=torch.int64, device=coords.device)
    table[coords[:, 1], coords[:, 2]] = torch.arange(len(coords), device=coords.device)
    return table


def _shifted(table: Tensor, down: int, right: int) -> Tensor:
    """What stands so many rows above and columns to the left of each place; -1 beyond the edge."""
    rows, columns = table.shape
    return torch.nn.functional.pad(table, (right, 0, down, 0), value=-1)[:rows, :columns]
