"""Dividing the grids of images into even cells."""

from __future__ import annotations

import torch
from torch import Tensor


def even_grid(rows: int, columns: int, count: int) -> tuple[int, int]:
    """The largest grid (r, c) with r <= rows, c <= columns and r * c <= count; of equals, the one nearest in
    proportion.
    """
    best, fit = (1, 1), (0, 0.0)
    for r in range(1, min(rows, count) + 1):
        c = min(columns, count // r)
        quality = (r * c, -abs(r / c - rows / columns))
        if quality > fit:
            best, fit = (r, c), quality
    return best


def grid_cells(coords: Tensor, count: int) -> Tensor:
    """A cell number for each visual token: images are divided evenly, into at most `count` cells in all.

    coords: int64 (V, 5), as hooks get them: image, row, column, rows, columns. Returns int64 (V,). Images share
    `count` in proportion to their grids; one whose share is less than a cell has -1 throughout. Reads the grids'
    sizes, so it waits for the device.
    """
    cells = torch.full((len(coords),), -1, dtype=torch.int64, device=coords.device)
    images, of_image = torch.unique(coords[:, 0], return_inverse=True)
    grids = [tuple(coords[of_image == i, 3:][0].tolist()) for i in range(len(images))]
    total = sum(rows * columns for rows, columns in grids)
    before = start = 0
    for i, (rows, columns) in enumerate(grids):
        upto = before + rows * columns
        share = count * upto // total - count * before // total
        if share:
            r, c = even_grid(rows, columns, share)
            cell = coords[:, 1] * r // rows * c + coords[:, 2] * c // columns + start
            cells = torch.where(of_image == i, cell, cells)
            start += r * c
        before = upto
    return cells


def middles(cells: Tensor) -> Tensor:
    """True at one token of each cell, the middle one in raster order (the later of two): bool (V,) for int64 (V,)."""
    same = cells[:, None] == cells[None, :]
    return (same.tril(-1).sum(1) == same.sum(1) // 2) & (cells >= 0)


def tile_of(coords: Tensor, places: Tensor, groups: Tensor) -> Tensor:
    """For each token of a crop that shows a whole image the group of the tile under its centre: int64 (V,).

    coords: int64 (V, 5), places: int64 (V, 4), as hooks get them for one sample. groups: int64 (V,), a number for each
    crop, as `crop_quotas` gives it. A tile is a crop that is a part of the grid in `places`. -1 for tokens of tiles,
    for tokens that show nothing, and where no tile of the same image with tokens left lies under the centre.
    """
    tokens = torch.arange(len(coords), device=coords.device)
    first = torch.full_like(tokens, len(coords)).scatter_reduce_(0, groups, tokens, "amin")[: groups.amax() + 1]
    image, size, whole = coords[first, 0], coords[first, 3:], places[first, 2:]
    begin = places[first, :2] - coords[first, 1:3]
    part, shown = (size != whole).any(1) & (places[first, 0] >= 0), coords[:, 1] >= 0
    # The centre of row r of n rows lies at (2 r + 1) / (2 n) of the image: whole numbers, so that no border is missed.
    centre = (2 * coords[:, None, 1:3] + 1) * whole
    unit = 2 * coords[:, None, 3:]
    under = ((begin * unit <= centre) & (centre < (begin + size) * unit)).all(-1)
    under &= part & (image == coords[:, :1]) & (shown & ~part[groups])[:, None]
    return torch.where(under.any(1), under.long().argmax(1), -1)
