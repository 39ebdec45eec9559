"""Every strategy and composition equals the masked reference in float64: prefill and eight decode steps."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from cases import BATCHES, COMPOSED, PIPELINES, full_crossing, pipeline
from twins import pool_merges
from wrong import AllAlike, OneLayerLate, PadsSeen, Renumbered

import prunekit
from prunekit.testing.tiny import row_of, tiny_inputs, tiny_llava
from prunekit.verify.equivalence import assert_equivalent, generate
from prunekit.verify.oracle import MaskedReference
from prunekit.verify.precision import Float64Throughout

STEPS, EXACT = 8, 1e-9
model_of = cache(tiny_llava)


@cache
def batch_of(name):
    return tiny_inputs(*BATCHES[name])


def check(name, attention, batch):
    """Logits, then what the report says about itself."""
    spec = pipeline(name)
    result = assert_equivalent(
        model_of(attention), spec, batch_of(batch), STEPS, EXACT, merges=pool_merges(spec["stages"])
    )
    report = result.report
    assert result.logits.shape[:2] == (len(BATCHES[batch][0]), STEPS + 1)
    assert len(report.events) == sum(stage["use"] not in ("dense", "skip_layers") for stage in spec["stages"])
    return result


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", PIPELINES)
def test_equals_the_masked_reference(name, batch, attention):
    check(name, attention, batch)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", full_crossing())
def test_full_crossing_equals_the_masked_reference(name, batch, attention):
    check(name, attention, batch)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("batch", ["ragged", "text-row"])
@pytest.mark.parametrize("name", ["random-4", "fastv", "pool-3", *COMPOSED])
def test_each_row_of_a_batch_equals_its_own_run(name, batch, attention):
    model, inputs, spec = model_of(attention), batch_of(batch), pipeline(name)
    with Float64Throughout(), prunekit.apply(model, spec) as run:
        together = generate(model, inputs, max_new_tokens=STEPS + 1)
        report = run.report
        for row, images in enumerate(BATCHES[batch][0]):
            if not images and report.events:
                continue  # it warns that token stages have nothing to do; test_generate looks at that
            alone = generate(model, row_of(inputs, row), max_new_tokens=STEPS + 1)
            for step in range(STEPS + 1):
                assert (together.logits[step][row] - alone.logits[step][0]).abs().max() < EXACT
            assert [event.kept[row] for event in report.events] == [event.kept[0] for event in run.report.events]
            for field in (
                "prompt_tokens",
                "visual_tokens",
                "kept_tokens",
                "layer_tokens",
                "mlp_tokens",
                "kv_tokens",
                "plans",
            ):
                assert getattr(report, field)[row] == getattr(run.report, field)[0], field
            assert report.cost.prefill_flops[row] == run.report.cost.prefill_flops[0]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no-cache"])
@pytest.mark.parametrize("name", [*PIPELINES, "seven-cuts"])
def test_all_positions_of_one_forward(name, use_cache, attention):
    """Not only the last token: every one that is left equals the reference, and a hole shows its predecessor."""
    model = model_of(attention)
    cuts = [{"use": "random", "keep": 0.95}, *({"use": "random", "at": k, "keep": 0.9 - 0.15 * k} for k in range(6))]
    spec = {"name": name, "stages": cuts} if name == "seven-cuts" else pipeline(name)
    for inputs in (batch_of("one"), batch_of("ragged"), batch_of("text-row")):
        with Float64Throughout():
            with prunekit.apply(model, spec) as run:
                logits = model(**inputs, use_cache=use_cache).logits
            report = run.report
            reference = MaskedReference(model, inputs, report, pool_merges(spec["stages"])(report))
            expected = reference.forward(inputs["input_ids"][:, :0]).logits
            difference = (logits - expected).abs().amax(-1)
        alive = inputs["attention_mask"].bool()
        for row, slots in enumerate(reference.visual):
            gone = set(range(len(slots))) - set(report.events[-1].kept[row] if report.events else range(len(slots)))
            alive[row, slots[list(gone)]] = False
            for slot in slots[sorted(gone)].tolist():
                assert (logits[row, slot] - logits[row, slot - 1]).abs().max() < EXACT
        assert difference[alive].max() < EXACT


@pytest.mark.parametrize("batch", ["one", "ragged"])
@pytest.mark.parametrize("wrong", [Renumbered, OneLayerLate, PadsSeen, AllAlike])
def test_a_wrong_reference_is_noticed(wrong, batch):
    """The check has power: a small mistake in the reference shows by far more than the tolerance."""
    result = check("fastv", "sdpa", batch)
    inputs = batch_of(batch)
    tokens = result.sequences[:, inputs["input_ids"].shape[1] :]
    with Float64Throughout():
        error = (wrong(model_of("sdpa"), inputs, result.report).logits(tokens) - result.logits).abs().max()
    if wrong is PadsSeen and batch == "one":
        assert error < EXACT, "a row without padding has none to see"
    else:
        assert error > 1e-3


def test_a_wrong_merge_is_noticed():
    spec = pipeline("pool")
    with pytest.raises(AssertionError, match="differ from the masked reference"):
        assert_equivalent(model_of("sdpa"), spec, batch_of("one"), STEPS, EXACT, merges=lambda report: {})


def test_float32_reaches_only_float32():
    """What the mode is for: the same run without it is off by float32 rounding, so 1e-9 could not be asked for."""
    model, inputs, spec = model_of("sdpa"), batch_of("ragged"), pipeline("fastv")
    with prunekit.apply(model, spec) as run:
        output = generate(model, inputs, max_new_tokens=3)
    tokens = output.sequences[:, inputs["input_ids"].shape[1] :]
    error = (MaskedReference(model, inputs, run.report).logits(tokens) - torch.stack(output.logits, 1)).abs().max()
    assert EXACT < error < 1e-4
