"""Shares of crops and frames against their naive twin."""

from __future__ import annotations

import naive
import torch
from hypothesis import given
from hypothesis import strategies as st

from prunekit import ops

crops = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(1, 5), st.booleans()), min_size=1)


@given(crops, st.integers(0, 40), st.integers(0, 1000), st.sets(st.integers(0, 2)) | st.none())
def test_crop_quotas(crops: list[tuple[int, int, int, bool]], count: int, seed: int, clips: set[int] | None) -> None:
    """Crops of several images, each once, with tokens that are gone and newlines; some of them are videos."""
    shown = {(image, frame): (size, newline) for image, frame, size, newline in sorted(crops)}
    rows = [
        (image, -1 if newline and place == size else 0, place, 1, size, frame)
        for (image, frame), (size, newline) in shown.items()
        for place in range(size + newline)
    ]
    table = torch.tensor(rows)
    present = torch.rand(len(rows), generator=torch.Generator().manual_seed(seed)) < 0.8
    present[0] = True
    coords, frames = table[present, :5], table[present, 5]
    videos = None if clips is None else [image in clips for image in coords[:, 0].tolist()]
    groups, quota = ops.crop_quotas(coords, frames, count, None if videos is None else torch.tensor(videos))
    expected = naive.crop_quotas(coords.tolist(), frames.tolist(), count, videos)
    assert (groups.tolist(), quota.tolist()) == expected
    assert int(quota.sum()) == min(count, len(frames))
    for asked in (None, count) if videos else ():
        stays, clips = ops.clip_shares(coords, frames, torch.tensor(videos), asked)
        found = stays.tolist(), [(tokens.tolist(), share) for tokens, share in clips]
        assert found == naive.clip_shares(coords.tolist(), frames.tolist(), videos, asked)


def test_newlines_stay_only_where_nothing_else_can() -> None:
    coords = torch.tensor([[0, 0, 0, 1, 2], [0, 0, 1, 1, 2], [0, -1, -1, 1, 2]])
    for count, shares in ((1, [1, 0]), (2, [2, 0]), (3, [2, 1])):
        assert ops.crop_quotas(coords, torch.zeros(3, dtype=torch.int64), count)[1].tolist() == shares
