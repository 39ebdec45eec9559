"""Cells of image grids against their naive twins."""

from __future__ import annotations

import naive
import torch
from hypothesis import given
from hypothesis import strategies as st

from prunekit import ops

small = st.integers(1, 12)


@given(small, small, st.integers(1, 150))
def test_even_grid_is_the_largest_that_fits(rows: int, columns: int, count: int) -> None:
    assert ops.even_grid(rows, columns, count) == naive.even_grid(rows, columns, count)


def grid(*sizes: tuple[int, int]) -> torch.Tensor:
    return torch.tensor([[i, y, x, h, w] for i, (h, w) in enumerate(sizes) for y in range(h) for x in range(w)])


@given(st.lists(st.tuples(small, small), min_size=1, max_size=3), st.integers(1, 100), st.integers(0, 1000))
def test_cells_are_blocks_and_have_one_middle(sizes: list[tuple[int, int]], count: int, seed: int) -> None:
    coords = grid(*sizes)
    present = torch.rand(len(coords), generator=torch.Generator().manual_seed(seed)) < 0.7
    present[0] = True
    coords = coords[present]
    cells = ops.grid_cells(coords, count)
    assert cells.tolist() == naive.grid_cells(coords.tolist(), count)
    numbered = set(cells.tolist()) - {-1}
    assert len(numbered) <= count
    middle = ops.middles(cells)
    assert middle.tolist() == naive.middles(cells.tolist())
    assert int(middle.sum()) == len(numbered)
    for cell in numbered:
        assert len(set(coords[cells == cell, 0].tolist())) == 1  # never across images


def test_cells_of_a_square_image_are_its_pooling_windows() -> None:
    cells = ops.grid_cells(grid((4, 4)), 4).view(4, 4)
    assert torch.equal(cells, torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]))


def tiled(rows: list[int], columns: list[int], side: int, image: int) -> torch.Tensor:
    """Crop, coords and places, int64 (n, 10), of an image as LLaVA-NeXT has it: the whole, tiles, a newline.

    rows, columns: of each row and column of tiles, in tokens.
    """
    whole = [(0, image, y, x, side, side, y, x, side, side) for y in range(side) for x in range(side)]
    size = sum(rows), sum(columns)
    tiles = [
        (1 + i * len(columns) + j, image, y, x, h, w, sum(rows[:i]) + y, sum(columns[:j]) + x, *size)
        for i, h in enumerate(rows)
        for y in range(h)
        for j, w in enumerate(columns)
        for x in range(w)
    ]
    return torch.tensor(
        [*whole, *tiles, (len(rows) * len(columns), image, -1, -1, rows[-1], columns[-1], -1, -1, *size)]
    )


lengths = st.lists(st.integers(1, 4), min_size=1, max_size=3)


@given(st.lists(st.tuples(lengths, lengths), min_size=1, max_size=2), st.integers(1, 4), st.integers(0, 99))
def test_tile_of(images: list[tuple[list[int], list[int]]], side: int, seed: int) -> None:
    """Tiles of any size, tokens are gone, and there may be several images."""
    table = torch.cat([tiled(*image, side, number) for number, image in enumerate(images)])
    present = torch.rand(len(table), generator=torch.Generator().manual_seed(seed)) < 0.8
    present[0] = True
    frames, coords, places = table[present].split((1, 5, 4), dim=1)
    groups, _ = ops.crop_quotas(coords, frames[:, 0], 1)
    found = ops.tile_of(coords, places, groups)
    assert found.tolist() == naive.tile_of(coords.tolist(), places.tolist(), groups.tolist())


def test_every_token_of_a_whole_image_lies_on_a_tile() -> None:
    """Two by two tiles of 4 x 4 under a whole of 4 x 4: its quarters."""
    frames, coords, places = tiled([4, 4], [4, 4], 4, 0).split((1, 5, 4), dim=1)
    groups, _ = ops.crop_quotas(coords, frames[:, 0], 1)
    found = ops.tile_of(coords, places, groups)
    assert found[:16].view(4, 4).tolist() == [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]]
    assert (found[16:] == -1).all()
