"""The primitives choose what the authors' own selection code chose: `tests/goldens/*.json`."""

from __future__ import annotations

import pytest
import torch
from golden_files import drawn, golden_cases

from prunekit import ops

both_precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def cases(name: str, **params):
    """The cases of a file that have these parameters."""
    chosen = [case for case in golden_cases(name) if params.items() <= case["params"].items()]
    return pytest.mark.parametrize("case", [pytest.param(case, id=case["id"]) for case in chosen])


@both_precisions
@cases("cdpruner")
def test_dpp_as_cdpruner(case, dtype) -> None:
    """Relevance is minus the cosine with the text, on one scale for all images of the authors' batch."""
    t, params = drawn(case, dtype), case["params"]
    relevance = -ops.cosine(t["image_embeds"], t["text_embeds"]).mean(-1)
    relevance = ops.min_max(relevance.flatten()).view_as(relevance)
    order = ops.dpp(ops.cosine(t["tokens"]), params["keep"], relevance)
    for image, row in enumerate(order.tolist()):
        assert row == case["expected"]["derived_greedy_order"][str(image)]
        assert sorted(row) == case["expected"]["kept_sorted"][str(image)]


@both_precisions
@cases("mmtok")
def test_coverage_as_mmtok(case, dtype) -> None:
    """Targets are the words of the question and all tokens; some tokens may be excluded."""
    t, p = drawn(case, dtype), case["params"]
    valid = torch.ones(p["patches"], dtype=torch.bool)
    valid[p.get("excluded", [])] = False  # they need cover, but give none
    words = (ops.cosine(t["text"], t["tokens"]) / p["tv_temp"]).softmax(-1) / p["text_tokens"]
    tokens = (ops.cosine(t["vit_features"]) / p["vv_temp"]).softmax(-1) / p["patches"]
    order = ops.coverage(torch.cat([words, p["alpha"] * tokens]), p["keep"], valid=valid)
    assert order.tolist() == case["expected"]["derived_greedy_order"]
    assert sorted(order.tolist()) == case["expected"]["kept_sorted"]


@both_precisions
@cases("idpruner_mmr")
def test_mmr_as_idpruner(case, dtype) -> None:
    t, params = drawn(case, dtype), case["params"]
    order = ops.mmr(
        ops.min_max(t["raw_score"]), ops.cosine(t["tokens"]), params["keep"], params["mmr_lambda"],
        at_once=params["parallel_k"],
    )  # fmt: skip
    assert order.tolist() == case["expected"]["selected_in_order"]


@both_precisions
@cases("sparsevlm_v1.5")
def test_density_peaks_as_sparsevlm(case, dtype) -> None:
    """Clusters of the recycled tokens have the means that the authors appended."""
    params, expected = case["params"], case["expected"]
    start = params["image_start"]
    recycled = torch.tensor(expected["recycled_in_score_order"])
    states = drawn(case, dtype)["layer_output"][start : start + params["visual_tokens"]][recycled]
    distance = torch.cdist(states, states, compute_mode="donot_use_mm_for_euclid_dist") / params["dim"] ** 0.5
    owner = ops.density_peaks(distance, expected["clusters"], neighbours=expected["clusters"])
    means = torch.stack([states[owner == centre].mean(0) for centre in owner.unique()])
    authors = torch.tensor(expected["merged"], dtype=dtype)
    assert len(means) == len(authors)
    nearest = torch.cdist(authors, means).argmin(1)
    torch.testing.assert_close(means[nearest], authors, rtol=2e-5, atol=2e-5)


@both_precisions
@cases("prumerge", adaptive=True)
def test_outliers_as_prumerge(case, dtype) -> None:
    """The adaptive count is the number of outliers among one row of attention."""
    t, params, expected = drawn(case, dtype), case["params"], case["expected"]
    attention = (t["q"][0] @ t["k"].T / params["dim"] ** 0.5).softmax(-1)[1:]
    mask = ops.outliers(attention)
    assert int(mask.sum()) == expected["outlier_count"]
    assert mask.nonzero()[:, 0].tolist() == expected["kept_sorted"]


@cases("holov")
def test_quotas_as_holov(case) -> None:
    """Wherever no quota exceeds its chunk; elsewhere the authors append zeros, and prunekit shares the tokens out."""
    t, p = drawn(case, torch.float64), case["params"]
    chunks = torch.tensor_split(torch.arange(p["patches"]), p["chunks"])
    groups = torch.cat([torch.full((len(chunk),), i) for i, chunk in enumerate(chunks)])
    attention = 1000 * t["attention"]
    score = attention.clone()
    for chunk in chunks:
        similarity = ops.cosine(t["tokens"][chunk]).fill_diagonal_(0.0)
        mean = similarity.sum(1, keepdim=True) / (len(chunk) - 1)
        variance = (similarity - mean).square().sum(1) / (len(chunk) - 1)
        score[chunk] += 0.09 * variance * attention[chunk].abs().mean() / (variance.abs().mean() + 1e-6)
    sizes = ops.group_sizes(groups, p["chunks"])
    weights = torch.zeros(p["chunks"], dtype=torch.float64).index_add_(0, groups, score) / sizes
    quota = ops.quotas(weights, p["keep"], sizes, remainder="weight")
    kept = ops.group_top_k(attention, groups, quota)
    assert int(kept.sum()) == p["keep"]
    if not case["expected"]["zero_vectors"]:
        assert quota.tolist() == case["expected"]["derived_quotas"]
        assert kept.nonzero()[:, 0].tolist() == case["expected"]["kept_sorted"]


@cases("tokencarve")
def test_borda_and_matching_as_tokencarve(case) -> None:
    """Two rankings become one; of its first tokens the better half takes in the most similar of the others."""
    t, p, expected = drawn(case, torch.float64), case["params"], case["expected"]
    image = slice(p["image_start"], p["image_start"] + p["visual_tokens"])
    states = t["layer_output"][image]
    left, values, _ = torch.linalg.svd(states, full_matrices=False)
    information = (left * values).abs().sum(1)
    attention = t["attention"].mean(0)[-1, image]
    weight = p["attention_weight"]
    rank = ops.ranks(ops.borda([attention, information], [weight, 1 - weight]))
    assert rank.argsort()[: p["rank"]].tolist() == expected["ranked_first"]
    better = p["rank"] // 2
    owner = ops.bipartite_matching(
        ops.cosine(states), min(better, p["merge"]), sources=rank >= better, valid=rank < p["rank"]
    )
    joined = {i: j for i, j in enumerate(owner.tolist()) if j not in (-1, i)}
    assert joined == dict(map(tuple, expected["merge_from_to"]))
    assert [i for i, j in enumerate(owner.tolist()) if i == j] == expected["kept_sorted"]


@both_precisions
@cases("tome", class_token=False)
def test_bipartite_matching_as_tome(case, dtype) -> None:
    """Without a class token, whose towers the strategy splits otherwise; its other cases are tests of the strategy."""
    t, p = drawn(case, dtype), case["params"]
    owner = ops.bipartite_matching(ops.cosine(t["keys"].mean(0)), p["r"]).tolist()
    groups = {one: [i for i, other in enumerate(owner) if other == one] for one in owner}
    assert sorted(groups.values()) == sorted(case["expected"]["groups"])
