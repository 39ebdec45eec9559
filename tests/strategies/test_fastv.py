"""FastV's options and accountings; its goldens are in test_goldens."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from asking import stage_of
from loops import SEEDS, best, kept, sizes, some

import prunekit
from prunekit import Rows, SpecError
from prunekit.families import shape_of
from prunekit.testing.tiny import tiny_inputs, tiny_llava
from prunekit.verify.equivalence import assert_equivalent


@pytest.mark.parametrize("seed", SEEDS)
def test_it_keeps_what_a_loop_keeps(seed):
    visual, count = sizes(seed)
    attention = some(seed, visual, ties=seed % 2 == 0)
    assert kept(stage_of("fastv"), count, attention=attention) == sorted(best(attention.tolist(), count))


def test_options_choose_the_rows():
    assert stage_of("fastv").inputs["attention"] == Rows()
    changed = stage_of("fastv", rope=False, domain="visual").inputs["attention"]
    assert changed == Rows(rope=False, domain="visual")
    with pytest.raises(SpecError, match="domain"):
        stage_of("fastv", domain="image")


@pytest.mark.parametrize(
    "options", [{"rope": False}, {"domain": "visual"}, {"rope": False, "domain": "logits"}], ids=str
)
def test_options_are_exact(options):
    """And they choose other tokens: `domain: visual` the same ones for one head, but not for the mean of several."""
    stages = [{"use": "random", "keep": 0.75}, {"use": "fastv", "keep": 0.25, **options}]
    found = assert_equivalent(tiny_llava(), {"stages": stages}, tiny_inputs(images=(1, 2)), steps=3)
    assert found.error < 1e-9


@pytest.mark.parametrize(("wanted", "left"), [(192, 166), (128, 98)])
def test_an_average_over_layers_is_a_budget_of_the_pipeline(wanted, left):
    """Keep what K = 2 of 32 layers and 576 tokens leave for an average of 192 or 128 tokens entering a layer."""
    shape = dataclasses.replace(shape_of(tiny_llava()), layers=32, visual_tokens=576)
    pipeline = {"budget": {"layer_mean": wanted / 576}, "stages": [{"use": "fastv", "at": 2}]}
    (cut,) = prunekit.load(pipeline).bind(shape).cuts
    assert cut.keep.count(576, 576) == left
    assert (2 * 576 + 30 * left) / 32 <= wanted < (2 * 576 + 30 * (left + 1)) / 32
    # 64 is met by 29; the 30 of the literature are 64.1 on average.
    pipeline["budget"]["layer_mean"] = 64 / 576
    (cut,) = prunekit.load(pipeline).bind(shape).cuts
    assert cut.keep.count(576, 576) == 29


def test_what_is_kept_behind_the_cut_is_the_stage_s_own_budget():
    shape = dataclasses.replace(shape_of(tiny_llava()), layers=32, visual_tokens=576)
    (cut,) = prunekit.load({"stages": [{"use": "fastv", "keep": 0.5}]}).bind(shape).cuts
    assert str(cut.site) == "2" and cut.keep.count(576, 576) == 288
    assert (2 * 576 + 30 * 288) / 32 == 306


def test_its_own_cost():
    """One row of products; without rotation queries, keys and values of all tokens besides."""
    shape = shape_of(tiny_llava())
    row = 2 * 30 * shape.heads * shape.head_dim
    projections = 2 * 30 * (shape.attention_params - shape.output_params)
    for options, flops in (({}, row), ({"rope": False}, row + projections)):
        assert stage_of("fastv", **options).hook.flops(shape=shape, text=10, visual=20) == flops


def test_half_precision_ranks_as_float32_does():
    attention = torch.rand(64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    assert kept(stage_of("fastv"), 9, attention=attention) == sorted(best(attention.float().tolist(), 9))
