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
