"""Each primitive against a naive twin that is written for reading."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from prunekit.ops import even_grid, grid_cells, max_min, middles, top_k_mask

small = st.integers(1, 12)


@given(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=9), min_size=1, max_size=4), st.integers(0, 10), st.data()
)
def test_top_k_mask_keeps_the_highest_and_the_lower_index_on_ties(
    rows: list[list[int]], k: int, data: st.DataObject
) -> None:
    width = max(map(len, rows))
    scores = torch.tensor([row + [9] * (width - len(row)) for row in rows], dtype=torch.float32)
    valid = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])
    counts = [data.draw(st.integers(0, k)) for _ in rows]
    mask = top_k_mask(scores, counts, valid)
    for row, count, got in zip(rows, counts, mask.tolist(), strict=True):
        best = sorted(range(len(row)), key=lambda i: (-row[i], i))[:count]
        assert [i for i, chosen in enumerate(got) if chosen] == sorted(best)
    assert torch.equal(top_k_mask(scores[0, valid[0]], counts[0]), mask[0, valid[0]])


def test_nan_and_infinity_change_what_is_chosen_but_not_how_many() -> None:
    nan, inf = torch.nan, torch.inf
    scores = torch.tensor([[nan, 1.0, -inf, inf, nan], [-inf, nan, nan, nan, 2.0]])
    valid = torch.tensor([[True] * 5, [False, True, True, True, True]])
    assert top_k_mask(scores, [2, 3], valid).tolist() == [
        [False, True, False, True, False],
        [False, True, True, False, True],
    ]
    assert top_k_mask(scores, 4, valid).sum(1).tolist() == [4, 4]
    distance = torch.full((6, 6), nan).fill_diagonal_(0.0)
    assert sorted(max_min(distance, 4).tolist()) == [0, 1, 2, 3]


@given(st.integers(2, 14), st.integers(0, 16), st.integers(0, 10_000))
def test_max_min_is_the_greedy_rule(items: int, count: int, seed: int) -> None:
    points = torch.randn(items, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    distance = torch.cdist(points, points).tolist()
    chosen: list[int] = []
    for _ in range(min(count, items)):
        others = [i for i in range(items) if i not in chosen]
        if chosen:
            gain = {i: min(distance[i][j] for j in chosen) for i in others}
        else:
            gain = {i: min(distance[i][j] for j in range(items) if j != i) for i in others}
        chosen.append(max(others, key=lambda i: (gain[i], -i)))
    assert max_min(torch.cdist(points, points), count).tolist() == chosen


@given(small, small, st.integers(1, 150))
def test_even_grid_is_the_largest_that_fits(rows: int, columns: int, count: int) -> None:
    r, c = even_grid(rows, columns, count)
    fitting = [x * y for x in range(1, rows + 1) for y in range(1, columns + 1) if x * y <= count]
    assert r <= rows and c <= columns and r * c == max(fitting)


def grid(*sizes: tuple[int, int]) -> torch.Tensor:
    return torch.tensor([[i, y, x, h, w] for i, (h, w) in enumerate(sizes) for y in range(h) for x in range(w)])


@given(st.lists(st.tuples(small, small), min_size=1, max_size=3), st.integers(1, 100), st.integers(0, 1000))
def test_cells_are_blocks_and_have_one_middle(sizes: list[tuple[int, int]], count: int, seed: int) -> None:
    coords = grid(*sizes)
    present = torch.rand(len(coords), generator=torch.Generator().manual_seed(seed)) < 0.7
    present[0] = True
    coords = coords[present]
    cells = grid_cells(coords, count)
    numbered = set(cells.tolist()) - {-1}
    assert len(numbered) <= count
    middle = middles(cells)
    assert int(middle.sum()) == len(numbered)
    for cell in numbered:
        members = [i for i, other in enumerate(cells.tolist()) if other == cell]
        assert len({coords[i, 0].item() for i in members}) == 1  # never across images
        assert [i for i in members if middle[i]] == [members[len(members) // 2]]


def test_cells_of_a_square_picture_are_its_pooling_windows() -> None:
    cells = grid_cells(grid((4, 4)), 4).view(4, 4)
    assert torch.equal(cells, torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]))
