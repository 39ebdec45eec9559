"""Scaling within a row, and outliers, against their naive twins."""

from __future__ import annotations

import itertools

import naive
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ragged import DTYPES, Case, Ragged, check, integers, ragged, scores_of, seeds

from prunekit import ops


@given(ragged(), seeds)
def test_outliers(batch: Ragged, seed: int) -> None:
    rows = [[x**3 for x in row] for row in scores_of(batch, seed)]
    case = Case(batch, {"scores": rows}, options={"factor": 0.5})
    check(ops.outliers, lambda scores, factor: naive.outliers(scores, factor) if scores else [], case, "mask")


def test_quartiles_are_those_of_numpy() -> None:
    scores = torch.randn(576, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).exp()
    low, high = np.percentile(scores.numpy(), [25, 75])
    assert torch.equal(ops.outliers(scores), scores > high + 1.5 * (high - low))
    assert 0 < int(ops.outliers(scores).sum()) < 100


def test_nan_is_no_outlier_and_moves_no_quartile() -> None:
    scores = torch.tensor([torch.nan, 1.0, 2.0, 3.0, 4.0, 100.0, torch.nan])
    assert ops.outliers(scores).nonzero().flatten().tolist() == [5]
    assert not ops.outliers(torch.full((4,), torch.nan)).any()
    assert not ops.outliers(torch.ones(4)).any()


@given(ragged(), seeds)
def test_min_max(batch: Ragged, seed: int) -> None:
    rows = scores_of(batch, seed)
    for dtype, padding in itertools.product(DTYPES, (7.0, torch.nan)):
        scaled = ops.min_max(batch.vector(rows, padding, dtype), batch.valid)
        assert not scaled[~batch.valid].any()
        for one, at, row in zip(scaled, batch.positions, rows, strict=True):
            if row:
                assert one[list(at)].tolist() == pytest.approx(naive.min_max(row), abs=1e-6)


def test_min_max_of_numbers_that_are_none() -> None:
    nan, inf = torch.nan, torch.inf
    assert ops.min_max(torch.tensor([2.0, nan, 4.0, inf, -inf, 3.0])).tolist() == [0.0, 0.0, 1.0, 1.0, 0.0, 0.5]
    assert ops.min_max(torch.tensor([nan, nan])).tolist() == [0.0, 0.0]
    assert ops.min_max(torch.tensor([-6e4, 6e4, 0.0], dtype=torch.float16)).tolist() == [0.0, 1.0, 0.5]


@given(st.integers(1, 6), st.integers(0, 4), st.integers(1, 5), seeds)
def test_cosine(tokens: int, others: int, width: int, seed: int) -> None:
    x, y = integers((2, tokens, width), -3, 3, seed), integers((2, others, width), -3, 3, seed + 1)
    for dtype in DTYPES:
        both, own = ops.cosine(x.to(dtype), y.to(dtype)), ops.cosine(x.to(dtype))
        assert both.dtype == torch.promote_types(dtype, torch.float32)
        for i in range(2):
            expected = torch.tensor(naive.cosine(x[i].tolist(), y[i].tolist())).view(tokens, others)
            assert torch.allclose(both[i].float(), expected, atol=1e-6)
            assert torch.allclose(own[i].float(), torch.tensor(naive.cosine(x[i].tolist(), x[i].tolist())), atol=1e-6)
