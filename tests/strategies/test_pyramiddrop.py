"""PyramidDrop: the authors' three stages, a twin by loops, and the schedule."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from asking import cases, stage_of
from golden_files import drawn
from loops import SEEDS, best, heads_of, kept, normed, sizes, some, turned

import prunekit
from prunekit import Rows, SpecError
from prunekit.families import shape_of
from prunekit.testing.tiny import tiny_inputs, tiny_llava
from prunekit.verify.equivalence import assert_equivalent


@pytest.mark.parametrize("case", cases("pyramiddrop", 4))
def test_the_authors_stages(case):
    """Each looks ahead from what the one before left, at positions that close up."""
    stage, p, t = stage_of("pyramiddrop"), case["params"], drawn(case, torch.float64)
    assert stage.inputs["attention"] == Rows(layer="next", queries="last", heads="mean")
    hidden, start, left = t["hidden"], p["image_start"], list(range(p["visual_tokens"]))
    for expected in case["expected"]["stages"].values():
        states = normed(hidden, t["norm_weight"])
        q, k = (turned(heads_of(states @ t[f"{name}_proj"].T, p["heads"]), p["rope_base"]) for name in "qk")
        query = p["prompt_len"] + len(left) - 1  # the last token of the instruction
        row = (q[:, query, None] @ k[:, : query + 1].transpose(1, 2) / p["head_dim"] ** 0.5).softmax(-1)[:, 0].mean(0)
        chosen = kept(stage, expected["count"], attention=row[start : start + len(left)])
        places = [*range(start), *(start + i for i in chosen), *range(start + len(left), len(hidden))]
        left, hidden = [left[i] for i in chosen], hidden[places]
        assert left == expected["kept_original"] and len(hidden) == expected["length"]


@pytest.mark.parametrize("seed", SEEDS)
def test_it_keeps_what_a_loop_keeps(seed):
    visual, count = sizes(seed)
    attention = some(seed, visual, ties=seed % 2 == 0)
    assert kept(stage_of("pyramiddrop"), count, attention=attention) == sorted(best(attention.tolist(), count))


@pytest.mark.parametrize(
    ("layers", "sites"), [(32, ["8", "16", "24"]), (28, ["7", "14", "21"]), (6, ["1", "3", "4"]), (2, ["0", "1"])]
)
def test_the_schedule_scales_with_depth(layers, sites):
    shape = dataclasses.replace(shape_of(tiny_llava()), layers=layers, visual_tokens=576)
    cuts = prunekit.load({"stages": [{"use": "pyramiddrop"}]}).bind(shape).cuts
    assert [str(cut.site) for cut in cuts] == sites
    if layers > 2:
        left = [cut.keep.count(576, 576) for cut in cuts]
        assert left == [288, 144, 72]
    if layers == 32:
        assert (8 * 576 + 8 * 288 + 8 * 144 + 8 * 72) / 32 == 270


def test_no_budget_is_below_what_its_layers_cost():
    """With its first cut at a quarter of the layers, an average below a quarter of the tokens is out of reach."""
    shape = dataclasses.replace(shape_of(tiny_llava()), layers=32, visual_tokens=576)
    with pytest.raises(SpecError, match="cannot be reached"):
        prunekit.load({"budget": {"layer_mean": 128 / 576}, "stages": [{"use": "pyramiddrop"}]}).bind(shape)
    with pytest.raises(SpecError, match=r"another point of the layer: '3' or '3.after'"):
        stage_of("pyramiddrop", at="3.mid")


@pytest.mark.parametrize("positions", ["keep", "renumber"])
def test_its_stages_are_exact_behind_another(positions):
    stages = [{"use": "random", "keep": 0.75}, {"use": "pyramiddrop"}]
    pipeline = {"positions": positions, "stages": stages}
    found = assert_equivalent(tiny_llava(), pipeline, tiny_inputs(images=(1, 2)), steps=3)
    assert [event.site for event in found.report.events] == ["encoder", "1", "3", "4"]
    assert [list(map(len, event.kept)) for event in found.report.events] == [[12, 24], [8, 16], [4, 8], [2, 4]]
