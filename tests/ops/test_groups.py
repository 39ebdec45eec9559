"""Budgets over groups against their naive twins."""

from __future__ import annotations

import naive
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ragged import DTYPES, Case, Ragged, check, ragged, scores_of, seeds

from prunekit import ops


@st.composite
def demands(draw: st.DrawFn) -> tuple[list[list[float]], list[int], list[list[int]]]:
    groups, rows = draw(st.integers(1, 7)), draw(st.integers(1, 3))
    number = st.one_of(st.integers(0, 6).map(float), st.sampled_from([0.0, 0.1, 0.125, 1e-9, 40.0, 60_000.0]))
    weights = st.lists(number, min_size=groups, max_size=groups)
    sizes = st.lists(st.integers(0, 12), min_size=groups, max_size=groups)
    rows_of = {"min_size": rows, "max_size": rows}
    totals = st.lists(st.integers(0, 60), **rows_of)
    return draw(st.lists(weights, **rows_of)), draw(totals), draw(st.lists(sizes, **rows_of))


@given(demands(), st.integers(0, 4), st.sampled_from(["fraction", "weight"]))
def test_quotas(demand, minimum: int, remainder: str) -> None:
    weights, totals, sizes = demand
    capacity = torch.tensor(sizes)
    for dtype in (torch.float32, torch.float64):
        exact = torch.tensor(weights, dtype=dtype)
        quota = ops.quotas(exact, totals, capacity, minimum, remainder)
        assert quota.dtype == torch.int64
        assert quota.tolist() == [
            naive.quotas(*row, minimum, remainder) for row in zip(exact.tolist(), totals, sizes, strict=True)
        ]
        assert quota.sum(1).tolist() == [min(total, sum(size)) for total, size in zip(totals, sizes, strict=True)]
        assert (quota <= capacity).all()
        least = capacity.clamp(max=minimum)
        fits = least.sum(1) <= torch.tensor(totals)
        assert (quota >= least)[fits].all()
        assert torch.equal(ops.quotas(exact[0], totals[0], capacity[0], minimum, remainder), quota[0])


@given(st.integers(1, 64), st.integers(0, 2000), seeds)
def test_quotas_are_exact_whatever_the_weights(groups: int, total: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(3, groups, dtype=torch.float64, generator=generator).mul(20).exp()
    capacity = torch.randint(0, 60, (3, groups), generator=generator)
    quota = ops.quotas(weights, total, capacity)
    assert quota.sum(1).tolist() == capacity.sum(1).clamp(max=total).tolist()
    assert (quota >= 0).all() and (quota <= capacity).all()


@pytest.mark.parametrize(
    ("weights", "total", "capacity", "minimum", "remainder", "expected"),
    [
        ([1.0] * 8, 98, [49] * 8, 1, "fraction", [13, 13, 12, 12, 12, 12, 12, 12]),
        ([5.0, 3.0, 2.0], 4, [9, 9, 9], 0, "fraction", [2, 1, 1]),
        ([5.0, 3.0, 2.0], 4, [9, 9, 9], 0, "weight", [3, 1, 0]),
        ([6.0, 9.0, 11.0], 20, [20, 28, 0], 0, "weight", [8, 12, 0]),  # shares are whole but for rounding
        ([8.0, 1.0, 1.0], 10, [4, 9, 9], 0, "fraction", [4, 3, 3]),
        ([1.0, 0.0, 0.0], 7, [3, 9, 9], 0, "fraction", [3, 2, 2]),
        ([0.0, 0.0, 1.0], 2, [5, 5, 5], 1, "fraction", [1, 0, 1]),
        ([torch.nan, torch.inf, 1.0], 4, [3, 3, 3], 0, "fraction", [0, 3, 1]),
    ],
)
def test_quotas_by_hand(weights, total, capacity, minimum, remainder, expected) -> None:
    assert ops.quotas(torch.tensor(weights), total, torch.tensor(capacity), minimum, remainder).tolist() == expected


@given(ragged(), seeds)
def test_group_sizes(batch: Ragged, seed: int) -> None:
    groups = scores_of(batch, seed, -1, 3)
    sizes = ops.group_sizes(batch.vector(groups, 2, torch.int64), 4, batch.valid)
    assert sizes.tolist() == [naive.group_sizes(row, 4) for row in groups]


@given(ragged(), seeds, st.lists(st.integers(0, 5), min_size=4, max_size=4))
def test_group_top_k(batch: Ragged, seed: int, quota: list[int]) -> None:
    case = Case(batch, {"scores": scores_of(batch, seed), "groups": scores_of(batch, seed + 50, -1, 3)})

    def in_groups(scores, groups, valid=None):
        groups = groups.nan_to_num(nan=1.0).long().clamp(max=3)
        return ops.group_top_k(scores, groups, torch.tensor(quota).expand(*groups.shape[:-1], 4), valid)

    def twin(scores, groups):
        return naive.group_top_k(scores, groups, quota)

    check(in_groups, twin, case, "mask")


def test_quotas_and_top_k_keep_exactly_the_total() -> None:
    generator = torch.Generator().manual_seed(1)
    groups = torch.randint(0, 5, (2, 40), generator=generator)
    for dtype in DTYPES:
        scores = torch.randn(2, 40, generator=generator).to(dtype)
        quota = ops.quotas(torch.rand(2, 5, generator=generator), [13, 39], ops.group_sizes(groups, 5), minimum=1)
        assert ops.group_top_k(scores, groups, quota).sum(1).tolist() == [13, 39]


@given(st.lists(st.integers(-1, 4), min_size=1, max_size=20))
def test_group_members(groups: list[int]) -> None:
    found = ops.group_members(torch.tensor(groups), 5)
    assert [one.tolist() for one in found] == naive.group_members(groups, 5)


@given(st.integers(1, 9), st.randoms(use_true_random=False))
def test_slot_weights(size: int, random) -> None:
    slots = random.sample(range(size), random.randint(0, size))
    found = ops.slot_weights(torch.tensor(slots, dtype=torch.int64), size)
    assert found.tolist() == naive.slot_weights(slots, size)


@given(st.lists(st.tuples(st.integers(-1, 3), st.integers(-8, 8), st.integers(-8, 8)), min_size=1, max_size=9))
def test_group_means(rows: list[tuple[int, int, int]]) -> None:
    groups, values = [row[0] for row in rows], [[float(x) for x in row[1:]] for row in rows]
    for dtype in DTYPES:
        found = ops.group_means(torch.tensor(values, dtype=dtype), torch.tensor(groups), 4)
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        wanted = torch.tensor(naive.group_means(values, groups, 4), dtype=found.dtype)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
        single = ops.group_means(torch.tensor(values, dtype=dtype)[:, 0], torch.tensor(groups), 4)
        torch.testing.assert_close(single, wanted[:, 0], rtol=1e-6, atol=1e-6)
