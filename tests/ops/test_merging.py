"""Where dropped tokens go, against the naive twins: every result is an `owner`."""

from __future__ import annotations

import naive
import torch
from hypothesis import given
from hypothesis import strategies as st
from ragged import Case, Ragged, check, counts_of, integers, matrices_of, ragged, scores_of, seeds

from prunekit import ops


@given(ragged(), seeds)
def test_nearest_kept(batch: Ragged, seed: int) -> None:
    similarity = [integers((n, n), -3, 3, seed + i).tolist() for i, n in enumerate(batch.lengths)]
    case = Case(batch, masks={"keep": scores_of(batch, seed, 0, 1)}, matrices={"similarity": similarity})
    check(ops.nearest_kept, naive.nearest_kept, case, "owner")


@given(ragged(tokens=10), seeds, st.booleans())
def test_bipartite_matching(batch: Ragged, seed: int, every_second: bool) -> None:
    masks = {"protected": [[int(x == 0) for x in row] for row in scores_of(batch, seed, 0, 4)]}
    if not every_second:
        masks["sources"] = scores_of(batch, seed + 50, 0, 1)
    similarity = [integers((n, n), -3, 3, seed + i).tolist() for i, n in enumerate(batch.lengths)]
    case = Case(batch, masks=masks, matrices={"similarity": similarity}, numbers={"merges": counts_of(batch, seed)})
    check(ops.bipartite_matching, naive.bipartite_matching, case, "owner")


def test_a_protected_first_token_is_a_source_that_stays() -> None:
    """As a CLS token: every second token is counted from it."""
    similarity = torch.zeros(5, 5)
    similarity[2, 1] = similarity[4, 3] = 1.0
    protected = torch.tensor([True, False, False, False, False])
    assert ops.bipartite_matching(similarity, 9, protected=protected).tolist() == [0, 1, 1, 3, 3]
    assert ops.bipartite_matching(similarity, 1, protected=protected).tolist() == [0, 1, 1, 3, 4]


def test_of_an_odd_number_at_most_half_go() -> None:
    assert ops.bipartite_matching(torch.ones(3, 3), 3).tolist() == [1, 1, 2]
    assert ops.bipartite_matching(torch.ones(1, 1), 3).tolist() == [0]


@given(ragged(), seeds, st.integers(1, 9))
def test_density_peaks(batch: Ragged, seed: int, neighbours: int) -> None:
    case = Case(
        batch,
        matrices={"distance": [[[x / 4 for x in row] for row in m] for m in matrices_of(batch, seed, 0, 4, 0)]},
        numbers={"count": counts_of(batch, seed)},
        options={"neighbours": neighbours},
    )
    check(ops.density_peaks, naive.density_peaks, case, "owner")


@given(seeds)
def test_density_of_a_row_with_fewer_tokens_than_neighbours(seed: int) -> None:
    """The mean is over the tokens that the row has."""
    points = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    alone = torch.cdist(points, points)
    padded = torch.zeros(12, 12, dtype=torch.float64)
    padded[:6, :6] = alone
    owner = ops.density_peaks(padded, 3, neighbours=12, valid=torch.arange(12) < 6)
    assert owner[:6].tolist() == naive.density_peaks(alone.tolist(), 3, neighbours=12)


@given(ragged(), seeds, st.sampled_from((0.0, 0.5, 0.75, 1.0)), st.sampled_from((1.0, 1.5, 2.0)))
def test_density_cutoff(batch: Ragged, seed: int, cutoff: float, reach: float) -> None:
    quarters = [[[x / 4 for x in row] for row in m] for m in matrices_of(batch, seed, -1, 6)]
    options = {"cutoff": cutoff, "reach": reach}
    case = Case(batch, masks={"core": scores_of(batch, seed, 0, 1)}, matrices={"distance": quarters}, options=options)
    check(ops.density_cutoff, naive.density_cutoff, case, "owner")


@given(seeds, st.floats(0.0, 1.5))
def test_centres_lie_apart_and_reach_all_core_tokens(seed: int, cutoff: float) -> None:
    points = torch.randn(40, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    distance = torch.cdist(points, points)
    core = torch.arange(40) < 25
    owner = ops.density_cutoff(distance, cutoff, core=core)
    centres = owner[owner == torch.arange(40)]
    assert bool(core[centres].all()) and bool((owner[core] >= 0).all())
    among = distance[centres][:, centres]
    assert bool((among[~torch.eye(len(centres), dtype=torch.bool)] > cutoff).all())


@given(seeds, st.integers(1, 12), st.integers(0, 12), st.booleans())
def test_recycle(seed: int, tokens: int, kept: int, ties: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(tokens, 3, dtype=torch.float64, generator=generator)
    scores = integers((tokens,), 0, 2 if ties else 1000, seed).double()
    kept = min(kept, tokens)
    recycled = int(integers((), 0, tokens - kept, seed + 1)) if kept < tokens else 0
    clusters = min(int(integers((), 1, 3, seed + 2)), recycled)
    found = ops.recycle(scores, states, kept, recycled if clusters else 0, clusters)
    numbers = kept, recycled if clusters else 0, clusters
    assert found.tolist() == naive.recycle(scores.tolist(), states.tolist(), *numbers)


def test_density_peaks_of_clear_clusters() -> None:
    points = torch.tensor([[0.0], [0.1], [0.2], [5.0], [5.1], [5.3], [9.0], [9.1], [9.25]])
    owner = ops.density_peaks(torch.cdist(points, points), 3, neighbours=3)
    assert [owner[i : i + 3].unique().numel() for i in (0, 3, 6)] == [1, 1, 1]
    assert owner.unique().numel() == 3


@given(ragged(), seeds)
def test_owners_are_kept_tokens(batch: Ragged, seed: int) -> None:
    distance = batch.matrix(matrices_of(batch, seed, 0, 4, 0), 7, torch.float64)
    keep = ops.top_k_mask(batch.vector(scores_of(batch, seed), 7, torch.float64), counts_of(batch, seed), batch.valid)
    for owner in (
        ops.nearest_kept(-distance, keep, batch.valid),
        ops.bipartite_matching(-distance, 2, valid=batch.valid),
        ops.density_peaks(distance, 2, 2, batch.valid),
    ):
        again = owner.gather(-1, owner.clamp(min=0)).masked_fill(owner < 0, -1)
        assert torch.equal(again, owner)
