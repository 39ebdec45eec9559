"""FastV and DivPrune choose exactly what their authors' own code chose: `tests/goldens/*.json`.

Each file holds seeded inputs and the indices that the authors' functions returned for them. A missing file fails.
"""

from __future__ import annotations

import pytest
import torch
from asking import ask, cases, stage_of
from golden_files import drawn

import prunekit

COUNTS = {"fastv": 5, "divprune": 4}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", cases("fastv", COUNTS["fastv"]))
def test_fastv(case, dtype):
    """The drawn map, reduced as the strategy declares it, through its own score and the default selection."""
    stage, params = stage_of("fastv"), case["params"]
    rows = stage.inputs["attention"]
    assert (rows.layer, rows.queries, rows.heads) == ("previous", "last", "mean")
    maps = drawn(case, dtype)["attention"]
    start, visual = params["image_start"], params["visual_tokens"]
    attention = maps.mean(0)[-1, start : start + visual][None]
    valid = torch.ones(1, visual, dtype=torch.bool)
    count = (case["expected"]["count"],)
    shared = {"attention": attention, "valid": valid, "count": count, "seed": (0,), "state": {}}
    scores = ask(stage, "score_tokens", **shared)
    keep = ask(stage, "select_tokens", scores=scores, **shared)
    assert keep.shape == (1, visual)
    assert keep[0].nonzero()[:, 0].tolist() == case["expected"]["kept_sorted"]
    order = scores[0].argsort(descending=True, stable=True)[: count[0]]
    assert order.tolist() == case["expected"]["kept_in_score_order"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", cases("divprune", COUNTS["divprune"]))
def test_divprune(case, dtype):
    """The drawn features through the strategy's hook; it is asked one sample at a time."""
    stage = stage_of("divprune")
    assert stage.per_sample
    tokens = drawn(case, dtype)["tokens"]
    valid = torch.ones(len(tokens), dtype=torch.bool)
    keep = ask(stage, "select_tokens", hidden=tokens, valid=valid, count=case["expected"]["count"], seed=0, state={})
    assert keep.nonzero()[:, 0].tolist() == case["expected"]["kept_sorted"]


@pytest.mark.parametrize("case", cases("divprune", COUNTS["divprune"]))
def test_divprune_in_the_authors_order(case):
    """The public primitive gives the greedy order itself."""
    from prunekit.ops import max_min

    tokens = torch.nn.functional.normalize(drawn(case, torch.float64)["tokens"], dim=-1)
    chosen = max_min(1 - tokens @ tokens.T, case["expected"]["count"])
    assert chosen.tolist() == case["expected"]["selected_in_order"]


def test_the_authors_counts():
    """FastV's and DivPrune's counts from their ratios, where ours round half up."""
    for name in COUNTS:
        for case in cases(name, COUNTS[name]):
            params, expected = case.values[0]["params"], case.values[0]["expected"]
            if "ratio" in params:
                keep = prunekit.Keep(params["ratio"])
                assert keep.count(params["visual_tokens"], params["visual_tokens"]) == expected["count"]
