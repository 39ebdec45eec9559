"""Baseline: average-pool the grid of visual tokens, as a smaller image would; hard to beat (https://arxiv.org/abs/2502.11501)."""

from __future__ import annotations

from torch import Tensor

from prunekit import ModelShape, Selection, hookimpl, strategy
from prunekit.ops import grid_cells, middles


@strategy(group="baselines", per_sample=True)
class Pool:
    """Average the tokens of each cell of an even grid into the cell's middle token.

    The grid is the largest one with no more cells than `count`, so fewer tokens than asked for may be left: 16 of 17
    on a square image. Cells that an earlier stage emptied give no token.
    """

    @hookimpl
    def select_tokens(self, coords: Tensor, hidden: Tensor, count: int) -> Selection:
        """Keep one token a cell, bool (V,), with the weights of its average, float (V, V)."""
        cells = grid_cells(coords, count)
        same = (cells[:, None] == cells[None, :]).to(hidden.dtype)
        return Selection(keep=middles(cells), weights=same / same.sum(1, keepdim=True))

    @hookimpl
    def flops(self, shape: ModelShape, text: int, visual: int) -> int:
        """Each token is added to its cell once."""
        return 2 * visual * shape.hidden
