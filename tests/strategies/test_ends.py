"""The baselines `first` and `last`."""

from __future__ import annotations

from random import Random

import pytest
import torch
from asking import ask, stage_of

from prunekit.testing.subject import BATCHES
from prunekit.testing.tiny import tiny_inputs, tiny_llava
from prunekit.verify.equivalence import assert_equivalent


@pytest.mark.parametrize("seed", range(50))
def test_as_loops(seed):
    """Batches of samples of any length, thinned by an earlier stage; by the numbers that the tokens had at first."""
    rng = Random(seed)
    rows = [sorted(rng.sample(range(40), rng.randint(1, 20))) for _ in range(rng.randint(1, 3))]
    counts = tuple(rng.randint(1, len(row)) for row in rows)
    index = torch.nn.utils.rnn.pad_sequence(list(map(torch.tensor, rows)), batch_first=True, padding_value=-1)
    for use, part in (("first", lambda row, n: row[:n]), ("last", lambda row, n: row[-n:])):
        stage, given = stage_of(use), {"index": index, "valid": index >= 0, "count": counts}
        keep = ask(stage, "select_tokens", scores=ask(stage, "score_tokens", **given), **given)
        for row, one, kept, count in zip(rows, index, keep, counts, strict=True):
            assert one[kept].tolist() == part(row, count)


@pytest.mark.parametrize("use", ["first", "last"])
def test_behind_another_stage(use):
    pipeline = {"stages": [{"use": "random", "keep": 0.7}, {"use": use, "keep_tokens": 3}]}
    result = assert_equivalent(tiny_llava(), pipeline, tiny_inputs(**BATCHES["ragged"]), steps=2)
    for before, after in zip(*(event.kept for event in result.report.events), strict=True):
        assert after == (before[:3] if use == "first" else before[-3:])
