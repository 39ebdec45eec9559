"""PAR as a strategy: options, budgets, nested choices, and what really does not run."""

from __future__ import annotations

import itertools

import pytest
import torch

import prunekit
from prunekit.families import shape_of
from prunekit.testing.tiny import tiny_inputs, tiny_llava
from prunekit.upstream import CACHE
from prunekit.verify.equivalence import assert_equivalent, generate
from prunekit.verify.precision import Float64Throughout

RAGGED = {"images": (1, 2, 1), "text": (14, 6, 9)}


def par(**keys) -> prunekit.Pipeline:
    stage = {"use": "par", "weights": None, "seed": 0, "width": 32, **keys}
    if not {"keep", "keep_tokens", "keep_layers"} & keys.keys():
        stage["keep"] = 0.5
    return prunekit.load({"name": "par", "stages": [stage]})


def run(model, pipeline, inputs):
    with Float64Throughout(), prunekit.apply(model, pipeline) as attached:
        output = generate(model, inputs, max_new_tokens=3)
    return attached.report, torch.stack(output.logits, 1)


@pytest.mark.parametrize(("at", "keep_layers"), [("encoder", 3), (0, 4), (2, 3), (2, 4), ("2.mid", 4), ("3.after", 3)])
def test_dropping_and_skipping_equals_masking(at, keep_layers):
    model = tiny_llava()
    for keep in (0.3, 1.0):
        assert_equivalent(model, par(at=at, keep=keep, keep_layers=keep_layers), tiny_inputs(**RAGGED), steps=5)


def test_released_choices_skip_any_layer_also_neighbours():
    model, inputs = tiny_llava(layers=8), tiny_inputs(**RAGGED)
    pipeline = par(protect=[], keep=0.25, keep_layers=3, attention="causal", width="model", layer_tokens="zeros")
    found = assert_equivalent(model, pipeline, inputs, steps=5)
    skipped = [sorted(layer for layer, _ in plan) for plan in found.report.plans]
    assert any(b - a == 1 for row in skipped for a, b in itertools.pairwise(row))


def test_everything_kept_is_the_dense_model_to_the_bit():
    model, inputs = tiny_llava(), tiny_inputs(**RAGGED)
    _, logits = run(model, par(keep=1.0, keep_layers=6), inputs)
    with Float64Throughout():
        dense = torch.stack(generate(model, inputs, max_new_tokens=3).logits, 1)
    assert torch.equal(logits, dense)


def test_every_count_of_tokens_and_layers_is_met_and_choices_are_nested():
    model, inputs = tiny_llava(), tiny_inputs(images=(1, 1), text=(9, 5))
    before_tokens, before_layers = [set(), set()], [set(range(6))] * 2
    for count in range(1, 17):
        report, _ = run(model, par(keep_tokens=count), inputs)
        kept = [set(row) for row in report.events[0].kept]
        assert all(len(now) == count and now >= then for now, then in zip(kept, before_tokens, strict=True))
        before_tokens = kept
    for count in range(1, 7):
        report, _ = run(model, par(keep=0.5, keep_layers=count, protect=[]), inputs)
        skipped = [plan.layers for plan in report.plans]
        assert all(len(now) == 6 - count and now <= then for now, then in zip(skipped, before_layers, strict=True))
        before_layers = skipped


def test_cache_lengths_are_the_plan_and_skipped_layers_are_never_called():
    model, inputs = tiny_llava(), tiny_inputs(images=(1,), text=9)
    called = dict.fromkeys(range(6), 0)
    for number, layer in enumerate(model.model.language_model.layers):
        layer.mlp.register_forward_hook(lambda *_, number=number: called.update({number: called[number] + 1}))
    with prunekit.apply(model, par(keep=0.25, keep_layers=4)) as attached:
        output = model.generate(**inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    (plan,) = attached.report.plans
    skipped = plan.layers
    assert len(skipped) == 2 and skipped <= {2, 3, 4}
    assert [called[number] for number in range(6)] == [0 if number in skipped else 3 for number in range(6)]
    physical = [0 if layer.keys is None else layer.keys.shape[-2] for layer in output[CACHE].layers]
    prompt, kept = 26, 14
    assert physical == [0 if n in skipped else (prompt if n < 2 else kept) + 2 for n in range(6)]


def test_rows_are_routed_one_by_one():
    model, pipeline = tiny_llava(), par(keep=0.25, keep_layers=4, seed=1, width=512)
    report, _ = run(model, pipeline, tiny_inputs(images=(1, 0, 3), text=(14, 6, 9)))
    assert report.kept_tokens == (4, 0, 12)
    report, _ = run(model, pipeline, tiny_inputs(**RAGGED))
    assert len({plan.layers for plan in report.plans}) > 1


def test_it_says_that_it_is_untrained():
    report, _ = run(tiny_llava(), par(), tiny_inputs())
    assert [note for note in report.notes if "untrained" in note]


def test_a_seed_is_another_router():
    model, inputs = tiny_llava(), tiny_inputs()
    first, again, other = (run(model, par(seed=seed, keep=0.25), inputs)[0].events[0].kept for seed in (0, 0, 1))
    assert first == again != other


def test_eligible_and_protected_layers():
    shape = shape_of(tiny_llava())
    cases = [
        ({}, {0, 1, 5}), ({"protect": []}, set()), ({"eligible": "second_half", "protect": []}, {0, 1, 2}),
        ({"eligible": "second_half"}, {0, 1, 2, 5}), ({"eligible": [3, -2], "protect": [3]}, {0, 1, 2, 3, 5}),
    ]  # fmt: skip
    for options, protected in cases:
        assert par(keep_layers=6, **options).bind(shape).protected == protected, options


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"seed": None}, r"stages\[0\].*seed: an untrained router"),
        ({"weights": ""}, "weights: name a router folder"),
        ({"weights": "no/such/router"}, "weights: there is no router 'no/such/router'"),
        ({"depth": 0}, "depth: must be at least 1"),
        ({"init": "llm_first"}, "init: llm_first copies blocks"),
        ({"attention": "sideways"}, "attention: must be 'bidirectional'"),
        ({"width": "wide"}, "width: must be"),
    ],
)
def test_options_that_make_no_router(keys, message):
    with pytest.raises(prunekit.SpecError, match=message):
        par(**keys)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"protect": [6]}, r"protect: the model has layers 0 to 5, not \[6\]"),
        ({"eligible": [-7]}, "eligible: the model has layers 0 to 5"),
        ({"width": 20, "heads": 3}, "heads: 3 heads do not share a width of 20"),
        ({"width": "model", "heads": 3}, "heads: blocks of the model's width have its 4 heads"),
        ({"keep_layers": 2}, "keep_layers: leaves 2 layers, but it protects, or .* layers 0, 1, 5"),
        ({"at": 7}, "there is no layer 7"),
    ],
)
def test_options_that_do_not_fit_the_model(keys, message):
    with pytest.raises(prunekit.SpecError, match=message):
        par(**keys).bind(shape_of(tiny_llava()))


def test_an_untrained_copy_is_refused_before_the_decoder_runs():
    with (
        pytest.raises(prunekit.Unsupported, match="prunekit train"),
        prunekit.apply(model := tiny_llava(), par(init="llm_first", width="model")),
    ):
        model(**tiny_inputs())


def test_the_router_is_in_the_cost_of_a_run_and_of_a_forecast():
    from prunekit.pipeline.forecast import forecast

    model, inputs = tiny_llava(), tiny_inputs()
    shape, stride = shape_of(model), {"use": "stride", "keep": 0.5}
    router = {"use": "par", "weights": None, "seed": 0, "width": 16, "keep_tokens": 4, "keep_layers": 4}
    for stages, seen in (([router], 16), ([stride, router], 8)):
        pipeline = prunekit.load({"name": "p", "stages": stages})
        own = pipeline.stages[-1].strategy.flops(shape, 10, seen)
        report, _ = run(model, pipeline, inputs)
        assert report.cost.decision_flops == (own,) and own > 0
        told = forecast(pipeline.bind(shape), 10)
        assert told is not None and told.flops[0] == told.flops[1]
        assert report.cost.flops_fraction == pytest.approx(told.flops[0] + told.decisions)
