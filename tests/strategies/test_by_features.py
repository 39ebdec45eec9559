"""Strategies that choose by the tower's features and attention, together: composition, crops, and what they cost."""

from __future__ import annotations

import pytest
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

import prunekit
from prunekit import cost
from prunekit.families import shape_of
from prunekit.pipeline.forecast import forecast
from prunekit.testing.tiny import tiny_inputs, tiny_llava
from prunekit.testing.tiny_families import tiny_batch, tiny_model
from prunekit.verify.equivalence import assert_equivalent

# What a tower of three blocks needs.
OPTIONS = {
    "scope": {}, "mmtok": {}, "vscan": {}, "hiprune": {}, "gprune": {}, "idpruner": {},
    "lrcp": {}, "todre": {},
}  # fmt: skip


@pytest.mark.parametrize("use", OPTIONS)
def test_exact_at_the_default_site_and_behind_random(use):
    stages = [{"use": "random", "keep": 0.8}, {"use": use, "keep": 0.4, **OPTIONS[use]}]
    assert_equivalent(tiny_llava(), {"stages": stages}, tiny_inputs(images=(1, 2), text=(9, 5)), steps=2)


@pytest.mark.parametrize("use", OPTIONS)
def test_several_crops_and_newlines(use):
    """LLaVA-NeXT's crops share the count; what is kept is as many as were asked for."""
    model = tiny_model("llava_next")
    pipeline = {"stages": [{"use": use, "keep": 0.3, **OPTIONS[use]}]}
    (event,) = assert_equivalent(model, pipeline, tiny_batch(model), steps=2).report.events
    assert tuple(map(len, event.kept)) == event.asked


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("use", [*OPTIONS, "vscan_decoder", "flowcut", "tome"])
def test_other_precisions_run(use, dtype):
    """As many tokens are kept, and nothing that is computed from half precision is NaN."""
    model, inputs = tiny_llava(dtype=dtype), tiny_inputs(images=(1, 2), text=(9, 5), dtype=dtype)
    with prunekit.apply(model, {"stages": [{"use": use, "keep": 0.4, **OPTIONS.get(use, {})}]}) as run:
        assert model(**inputs).logits.isfinite().all()
    each = (6, 12) if run.report.events[-1].site.startswith("vision") else (6, 13)
    assert run.report.kept_tokens == each


@pytest.fixture(scope="module")
def llava_7b():
    with torch.device("meta"):
        return shape_of(LlavaForConditionalGeneration(LlavaConfig()))


@pytest.mark.parametrize("use", [*OPTIONS, "vscan_decoder", "flowcut", "tome"])
def test_a_decision_costs_at_most_two_percent(use, llava_7b):
    """Of the dense prefill of LLaVA-1.5-7B with 40 text tokens, however many are kept."""
    assert (llava_7b.layers, llava_7b.hidden, llava_7b.visual_tokens, llava_7b.tower.blocks) == (32, 4096, 576, 24)
    for keep in (64, 576):
        bound = prunekit.load({"stages": [{"use": use, "keep_tokens": keep}]}).bind(llava_7b)
        figures = forecast(bound, 40)
        assert 0 < figures.decisions <= 0.02
    assert cost.prefill_flops(llava_7b, [616] * 32) > 8e12
