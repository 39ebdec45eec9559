"""Ranking and the greedy choices against their naive twins."""

from __future__ import annotations

import naive
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ragged import DTYPES, Case, Ragged, check, counts_of, integers, matrices_of, ragged, scores_of, seeds

from prunekit import ops


@given(ragged(), seeds)
def test_top_k_mask(batch: Ragged, seed: int) -> None:
    case = Case(batch, {"scores": scores_of(batch, seed)}, numbers={"count": counts_of(batch, seed)})
    check(ops.top_k_mask, naive.top_k_mask, case, "mask")


@given(ragged(), seeds)
def test_ranks(batch: Ragged, seed: int) -> None:
    rows = scores_of(batch, seed)
    for dtype in (*DTYPES, torch.int64):
        rank = ops.ranks(batch.vector(rows, 7, dtype), batch.valid)
        assert [row[list(at)].tolist() for row, at in zip(rank, batch.positions, strict=True)] == [
            naive.ranks(row) for row in rows
        ]
        assert rank.sort().values.tolist() == [list(range(batch.width))] * len(rows)


def test_many_ties_are_broken_by_the_lower_index() -> None:
    """Of few entries an unstable sort is stable as well."""
    scores = integers((3, 2000), 0, 2, seed=0)
    for dtype in DTYPES:
        mask = ops.top_k_mask(scores.to(dtype), 777)
        assert mask.tolist() == [naive.top_k_mask(row, 777) for row in scores.tolist()]
    groups = integers((3, 2000), 0, 4, seed=1)
    mask = ops.group_top_k(scores, groups, torch.full((3, 5), 99))
    rows = zip(scores.tolist(), groups.tolist(), strict=True)
    assert mask.tolist() == [naive.group_top_k(*row, [99] * 5) for row in rows]


def test_counts_may_stay_on_the_device() -> None:
    scores = torch.tensor([[1, 3, 2], [3, 2, 1]])
    counted = ops.top_k_mask(scores, torch.tensor([2, 1]))
    assert torch.equal(counted, ops.top_k_mask(scores, [2, 1]))


def test_nan_and_infinity_change_what_is_chosen_but_not_how_many() -> None:
    nan, inf = torch.nan, torch.inf
    scores = torch.tensor([[nan, 1.0, -inf, inf, nan], [-inf, nan, nan, nan, 2.0]])
    valid = torch.tensor([[True] * 5, [False, True, True, True, True]])
    assert ops.top_k_mask(scores, [2, 3], valid).tolist() == [
        [False, True, False, True, False],
        [False, True, True, False, True],
    ]
    assert ops.top_k_mask(scores, 4, valid).sum(1).tolist() == [4, 4]
    broken = torch.full((6, 6), nan)
    assert sorted(ops.max_min(broken.clone().fill_diagonal_(0.0), 4).tolist()) == [0, 1, 2, 3]
    assert ops.mmr(broken[0], broken, 4).tolist() == [0, 1, 2, 3]
    assert ops.coverage(broken, 4).tolist() == [0, 1, 2, 3]
    assert ops.dpp(broken, 4).tolist() == [0, 1, 2, 3]
    assert ops.mmr(torch.full((3,), -inf), broken[:3, :3], 2).tolist() == [0, 1]


@given(ragged(), seeds)
def test_borda(batch: Ragged, seed: int) -> None:
    rankings, weights = [scores_of(batch, seed), scores_of(batch, seed + 50)], [0.75, 0.25]
    for dtype in DTYPES:
        points = ops.borda([batch.vector(rows, 7, dtype) for rows in rankings], weights, batch.valid)
        assert points.dtype == torch.float64 and not points[~batch.valid].any()
        assert [row[list(at)].tolist() for row, at in zip(points, batch.positions, strict=True)] == [
            naive.borda([rows[i] for rows in rankings], weights) if n else [] for i, n in enumerate(batch.lengths)
        ]
    one = torch.tensor([3.0, 1.0, 2.0])
    assert ops.borda([one, -one]).tolist() == [4.0, 4.0, 4.0]


@given(ragged(), seeds)
def test_max_min(batch: Ragged, seed: int) -> None:
    matrices = {"distance": matrices_of(batch, seed, 0, 4, 0)}
    case = Case(batch, matrices=matrices, numbers={"count": counts_of(batch, seed)})
    check(ops.max_min, naive.max_min, case, "order")


@given(ragged(), seeds)
def test_max_min_with_weights(batch: Ragged, seed: int) -> None:
    """Also negative ones."""
    matrices = {"distance": matrices_of(batch, seed, 0, 4, 0)}
    vectors, numbers = {"weights": scores_of(batch, seed)}, {"count": counts_of(batch, seed)}
    check(ops.max_min, naive.max_min, Case(batch, vectors=vectors, matrices=matrices, numbers=numbers), "order")


@given(ragged(), seeds)
def test_max_sum(batch: Ragged, seed: int) -> None:
    case = Case(
        batch,
        vectors={"scores": scores_of(batch, seed)},
        matrices={"similarity": matrices_of(batch, seed)},
        numbers={"count": counts_of(batch, seed)},
    )
    check(ops.max_sum, naive.max_sum, case, "order")


def test_max_sum_takes_turns_between_two_opposite_clusters() -> None:
    side = torch.tensor([1.0, 1, 1, -1, -1, -1])
    assert ops.max_sum(side[:, None] * side, -side, 6).tolist() == [3, 0, 1, 4, 2, 5]


def test_precise() -> None:
    for dtype in DTYPES:
        wide = ops.precise(torch.tensor([1.0, 0.5], dtype=dtype))
        assert wide.tolist() == naive.precise([1.0, 0.5])
        assert wide.dtype == torch.promote_types(dtype, torch.float32)


@given(ragged(), seeds, st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.integers(1, 4))
def test_mmr(batch: Ragged, seed: int, balance: float, at_once: int) -> None:
    case = Case(
        batch,
        vectors={"scores": scores_of(batch, seed)},
        matrices={"similarity": matrices_of(batch, seed)},
        numbers={"count": counts_of(batch, seed)},
        options={"balance": balance, "at_once": at_once},
    )
    check(ops.mmr, naive.mmr, case, "order")


@given(ragged(), seeds)
def test_coverage_of_the_tokens_themselves(batch: Ragged, seed: int) -> None:
    """Padding has weight 0 among the targets."""
    case = Case(
        batch,
        vectors={"weights": scores_of(batch, seed, 0, 3), "saliency": scores_of(batch, seed + 50, 1, 3)},
        matrices={"similarity": matrices_of(batch, seed)},
        numbers={"count": counts_of(batch, seed)},
    )

    def weighted(similarity, count, weights, saliency, valid=None):
        if valid is not None:
            weights = weights.masked_fill(~valid, 0)
        return ops.coverage(similarity, count, weights, saliency, valid)

    check(weighted, naive.coverage, case, "order")


@given(st.integers(1, 8), st.integers(0, 5), st.integers(0, 9), seeds)
def test_coverage_of_other_targets(tokens: int, targets: int, count: int, seed: int) -> None:
    similarity = integers((2, targets, tokens), -3, 3, seed)
    for dtype in DTYPES:
        order = ops.coverage(similarity.to(dtype), count)
        assert order.tolist() == [
            naive.coverage(one, count, [1] * targets, [1] * tokens) for one in similarity.tolist()
        ]
    everyone = torch.ones(2, targets, dtype=torch.bool)
    assert torch.equal(ops.coverage(similarity.float(), count, everyone), order)


@given(ragged(), seeds, st.integers(1, 9))
def test_dpp(batch: Ragged, seed: int, dimensions: int) -> None:
    """With fewer dimensions than choices the volume is used up, and the lower index comes first."""
    kernels = []
    for i, n in enumerate(batch.lengths):
        vectors = integers((n, dimensions), -40, 40, seed + i)
        kernels.append((vectors @ vectors.T / 8).tolist())
    relevance = [[2.0 ** (x - 2) for x in row] for row in scores_of(batch, seed, 0, 3)]
    numbers = {"count": counts_of(batch, seed)}
    case = Case(batch, {"relevance": relevance}, matrices={"kernel": kernels}, numbers=numbers)
    check(ops.dpp, naive.dpp, case, "order", dtypes=(torch.float32, torch.float64))


def test_dpp_knows_dependent_tokens() -> None:
    """A copy adds no volume, whatever rounding says, and a kernel in half precision is computed in float32."""
    vectors = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    vectors = torch.cat([vectors, vectors])
    for dtype in DTYPES:
        kernel = (vectors.to(dtype).double() @ vectors.to(dtype).double().T).to(
            torch.promote_types(dtype, torch.float32)
        )
        order = ops.dpp(kernel, 12).tolist()
        assert sorted(order[:6]) == [0, 1, 2, 3, 4, 5] and order[6:] == [6, 7, 8, 9, 10, 11]
    assert ops.dpp(torch.eye(4, dtype=torch.float16), 3).tolist() == [0, 1, 2]
    relevance = torch.tensor([1.0, 3.0, 0.0, 2.0])
    assert ops.dpp(torch.eye(4), 4, relevance).tolist() == [1, 3, 0, 2]


@given(st.lists(st.integers(-1, 5), max_size=6), st.integers(6, 9))
def test_index_mask(indices: list[int], size: int) -> None:
    mask = ops.index_mask(torch.tensor([indices, indices], dtype=torch.int64), size)
    assert mask.tolist() == [naive.index_mask(indices, size)] * 2


@pytest.mark.parametrize("op", ["max_min", "coverage", "dpp"])
def test_nothing_and_everything_can_be_chosen(op: str) -> None:
    matrix = torch.eye(5)[None].expand(2, 5, 5)
    assert getattr(ops, op)(matrix, 0).shape == (2, 0)
    assert getattr(ops, op)(matrix, [5, 9]).sort().values.tolist() == [[0, 1, 2, 3, 4]] * 2
    assert getattr(ops, op)(matrix, 2, valid=torch.zeros(2, 5, dtype=torch.bool)).tolist() == [[-1, -1]] * 2
    assert getattr(ops, op)(torch.ones(1, 1), 1).tolist() == [0]
