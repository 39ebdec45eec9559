"""V2Drop: the authors' three layers, a twin by loops, and the schedule."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from asking import cases, stage_of
from golden_files import drawn
from loops import SEEDS, best, kept, sizes, some

import prunekit
from prunekit.families import shape_of
from prunekit.testing.tiny import tiny_inputs, tiny_llava
from prunekit.verify.equivalence import assert_equivalent


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", cases("v2drop", 2))
def test_the_authors_layers(case, dtype):
    stage, t, p = stage_of("v2drop"), drawn(case, dtype), case["params"]
    left = torch.arange(p["visual_tokens"])
    for layer, count in zip(p["keep"], case["expected"]["counts"], strict=True):
        hidden, before = (t[f"input_of_layer_{at}"][p["image_start"] + left] for at in (int(layer), int(layer) - 1))
        left = left[kept(stage, count, hidden=hidden, previous_hidden=before)]
        assert left.tolist() == case["expected"]["kept_after_layer"][layer]


@pytest.mark.parametrize("seed", SEEDS)
def test_it_keeps_what_a_loop_keeps(seed):
    visual, count = sizes(seed)
    hidden, before = some(seed, visual, 5, ties=seed % 2 == 0), some(seed + 100, visual, 5, ties=seed % 2 == 0)
    scores = [math.sqrt(sum((a - b) ** 2 for a, b in zip(x, y, strict=True)))
              for x, y in zip(hidden.tolist(), before.tolist(), strict=True)]  # fmt: skip
    assert kept(stage_of("v2drop"), count, hidden=hidden, previous_hidden=before) == sorted(best(scores, count))


def test_changes_beyond_half_precision_are_ranked():
    """A change of 70,000 is infinite in fp16, and so is the norm of many changes of 300."""
    hidden = torch.zeros(4, 4096, dtype=torch.float16)
    hidden[1], hidden[2], hidden[3, 0] = 1100, 1000, 60000
    before = torch.zeros_like(hidden)
    before[3, 0] = -60000
    assert kept(stage_of("v2drop"), 2, hidden=hidden, previous_hidden=before) == [1, 3]
    assert kept(stage_of("v2drop"), 1, hidden=hidden, previous_hidden=before) == [3]


@pytest.mark.parametrize(
    ("layers", "sites"), [(32, ["3", "17", "22"]), (28, ["3", "15", "19"]), (8, ["1", "4", "6"]), (6, ["1", "3", "4"])]
)
def test_the_schedule_scales_with_depth(layers, sites):
    shape = dataclasses.replace(shape_of(tiny_llava()), layers=layers, visual_tokens=576)
    cuts = prunekit.load({"stages": [{"use": "v2drop"}]}).bind(shape).cuts
    assert [str(cut.site) for cut in cuts] == sites
    assert [cut.keep.count(576, 576) for cut in cuts] == [288, 144, 1]
    if layers == 32:
        assert pytest.approx(202.8, abs=0.05) == (3 * 576 + 14 * 288 + 5 * 144 + 10 * 1) / 32


def test_it_is_exact_behind_another():
    stages = [{"use": "random", "keep": 0.75}, {"use": "v2drop"}]
    found = assert_equivalent(tiny_llava(), {"stages": stages}, tiny_inputs(images=(1, 2)), steps=3)
    assert [list(map(len, event.kept)) for event in found.report.events] == [[12, 24], [8, 16], [4, 8], [1, 1]]
