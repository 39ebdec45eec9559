"""What follows videos through time against its naive twins, and figures that need none."""

from __future__ import annotations

import naive
import torch
from hypothesis import given
from hypothesis import strategies as st

from prunekit import ops

videos = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=2)


@given(videos, st.integers(0, 1000), st.sampled_from((None, 1, 2, 3)), st.booleans())
def test_same_place(sizes: list[tuple[int, int, int]], seed: int, steps: int | None, newline: bool) -> None:
    """Videos of any size, with tokens that are gone, and newlines."""
    rows = [
        (video, row, column, down, across, frame)
        for video, (frames, down, across) in enumerate(sizes)
        for frame in range(frames)
        for row, column in [(r, c) for r in range(down) for c in range(across)] + [(-1, -1)] * newline
    ]
    table = torch.tensor(rows)
    present = torch.rand(len(rows), generator=torch.Generator().manual_seed(seed)) < 0.7
    present[0] = True
    coords, frames = table[present, :5], table[present, 5]
    expected = naive.same_place(coords.tolist(), frames.tolist(), steps)
    assert ops.same_place(coords, frames, steps).tolist() == expected


similarities = st.lists(st.sampled_from((-1.0, 0.5, 0.75, 0.9, 0.95, 1.0)), max_size=12)


@given(similarities, st.sampled_from((-2.0, 0.5, 0.9, 2.0)), st.integers(0, 14))
def test_segments(similarity: list[float], threshold: float, least: int) -> None:
    found = ops.segments(torch.tensor(similarity), threshold, least)
    assert found.tolist() == naive.segments(similarity, threshold, least)
    assert int(found[-1]) + 1 >= min(least, len(similarity) + 1)


def test_a_similarity_that_is_no_number_begins_a_segment() -> None:
    assert ops.segments(torch.tensor([1.0, torch.nan, 1.0]), 0.5, 1).tolist() == [0, 0, 1, 1]
