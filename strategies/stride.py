"""Baseline: a uniform sub-grid of the image, whatever it shows."""

from __future__ import annotations

import torch
from torch import Tensor

from prunekit import hookimpl, strategy
from prunekit.ops import grid_cells, middles


@strategy(group="baselines", per_sample=True)
class Stride:
    """Keep the middle tokens of the cells of an even grid, and spread the rest of `count` among the other tokens."""

    @hookimpl
    def select_tokens(self, coords: Tensor, count: int) -> Tensor:
        """Bool (V,) with exactly `count` True."""
        keep = middles(grid_cells(coords, count))
        rest = (~keep).nonzero()[:, 0]
        missing = count - (len(keep) - len(rest))
        spread = (2 * torch.arange(missing, device=rest.device) + 1) * len(rest) // (2 * max(missing, 1))
        return keep.index_fill(0, rest[spread], True)
