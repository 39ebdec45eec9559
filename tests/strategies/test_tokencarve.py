"""TokenCarve: the authors' choice and merge, a twin by loops, and what it crops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from asking import cases, stage_of
from golden_files import drawn
from loops import SEEDS, best, cosine, decided, sizes, some

from prunekit import SpecError
from prunekit.testing.tiny import tiny_inputs, tiny_llava
from prunekit.verify.equivalence import assert_equivalent


def merged(owner, states):
    """Means of the groups of kept tokens, in their order."""
    keep = [i for i, other in enumerate(owner) if other == i]
    return torch.stack([states[[j for j, other in enumerate(owner) if other == i]].mean(0) for i in keep])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", cases("tokencarve", 3))
def test_the_authors_choice(case, dtype):
    p, t, expected = case["params"], drawn(case, dtype), case["expected"]
    image = slice(p["image_start"], p["image_start"] + p["visual_tokens"])
    merges = min(p["rank"] // 2, p["merge"])
    count = p["rank"] - merges
    stage = stage_of("tokencarve", attention_weight=p["attention_weight"], spare=(merges + 0.5) / count)
    states = t["layer_output"][image]
    found = decided(stage, count, attention=t["attention"].mean(0)[-1, image], hidden=states)
    owner = found.weights.owner.tolist()
    assert found.crop and found.weights.mode == "mean"
    assert found.keep.nonzero()[:, 0].tolist() == expected["kept_sorted"]
    assert {(i, j) for i, j in enumerate(owner) if j not in (-1, i)} == set(map(tuple, expected["merge_from_to"]))
    features = torch.tensor(expected["features_first4"], dtype=dtype)
    torch.testing.assert_close(merged(owner, states)[:, :4], features, rtol=2e-5, atol=2e-5)


def twin(attention, states, count, weight, spare):
    """Owners; information by numpy's decomposition, everything else by loops."""
    left, values, _ = np.linalg.svd(np.array(states), full_matrices=False)
    information = [sum(abs(u * s) for u, s in zip(row, values, strict=True)) for row in left]
    number = len(states)
    points = [0.0] * number
    for scores, share in ((attention, weight), (information, 1 - weight)):
        for place, token in enumerate(best(scores, number)):
            points[token] += share * (number - place)
    ranked = best(points, min(count + int(spare * count), number))
    better, others = ranked[: len(ranked) // 2], ranked[len(ranked) // 2 :]
    owner = [i if i in ranked else -1 for i in range(number)]
    proposals = {}
    for one in others:
        alike = {other: cosine(states[one], states[other]) for other in better}
        target = min(better, key=lambda other: (-alike[other], other)) if better else one
        proposals[one] = (alike.get(target, 0.0), target)
    for one in sorted(others, key=lambda i: (-proposals[i][0], i))[: len(ranked) - count]:
        owner[one] = proposals[one][1]
    return owner


@pytest.mark.parametrize("seed", SEEDS)
def test_it_does_what_a_loop_does(seed):
    """Also where there are more tokens than channels, and where points are equal, as at weight 0.5 they often are."""
    visual, count = sizes(seed)
    attention, states = some(seed, visual, ties=seed % 3 == 0), some(seed + 100, visual, (4, 40)[seed % 2])
    weight, spare = (0.5, 0.618)[seed % 2], (0.5, 1.0, 0.0, 0.3)[seed % 4]
    stage = stage_of("tokencarve", attention_weight=weight, spare=spare)
    found = decided(stage, count, attention=attention, hidden=states)
    assert found.weights.owner.tolist() == twin(attention.tolist(), states.tolist(), count, weight, spare)
    assert int(found.keep.sum()) == count


def test_wrong_options():
    for name in ("attention_weight", "spare"):
        with pytest.raises(SpecError, match=f"{name}.*is from 0 to 1"):
            stage_of("tokencarve", **{name: 1.5})


@pytest.mark.parametrize("positions", ["keep", "renumber"])
def test_it_is_exact_behind_another_and_crops(positions):
    stages = [{"use": "random", "keep": 0.75}, {"use": "tokencarve", "keep": 0.25}]
    pipeline = {"positions": positions, "stages": stages}
    found = assert_equivalent(tiny_llava(), pipeline, tiny_inputs(images=(1, 2)), steps=3)
    report = found.report
    assert [len(one) for one in report.events[-1].kept] == [4, 8] and report.events[-1].crop
    assert set(report.kv_tokens[0]) == {report.layer_tokens[0][-1]}
