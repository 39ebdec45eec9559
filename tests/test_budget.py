"""Budgets of whole pipelines: the largest counts within them, by every accounting, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest

import prunekit
from prunekit import cost
from prunekit.families import shape_of
from prunekit.strategy.decisions import ModelShape
from prunekit.testing.tiny import tiny_inputs, tiny_llava

SHAPE = ModelShape("llava", 32, 4096, 32, 128, 4 * 4096**2, 3 * 4096 * 11008, 2 * 4096, 576, 4096**2)


def load(budget, *stages, **top) -> prunekit.Pipeline:
    return prunekit.load({"name": "b", "budget": budget, **top, "stages": list(stages)})


def counts(bound) -> list[int]:
    left, found = 576, []
    for cut in bound.cuts:
        left = cut.keep.count(576, left)
        found.append(left)
    return found


def flops(tokens, text=64, skip=0) -> float:
    """By hand: `tokens[l]` visual tokens in layer l; the last `skip` layers do not run."""
    run = [count + text for count in tokens][: len(tokens) - skip]
    return cost.prefill_flops(SHAPE, run) / cost.prefill_flops(SHAPE, [576 + text] * 32)


@pytest.mark.parametrize(
    ("fraction", "at"),
    [(fraction, at) for fraction in (0.2, 0.46, 0.8, 0.999, 1.0) for at in ("encoder", 2)] + [(0.46, 9), (1.0, 9)],
)
def test_the_largest_count_within_the_flops(fraction, at):
    (count,) = counts(load({"flops": fraction}, {"use": "random", "at": at}).bind(SHAPE))
    first = 0 if at == "encoder" else at

    def of(kept):
        return flops([576] * first + [kept] * (32 - first))

    assert of(count) <= fraction and (count == 576 or of(count + 1) > fraction)


def test_a_router_and_skipped_layers_are_in_the_sum():
    stage = {"use": "par", "weights": None, "seed": 0, "keep_layers": 24}
    pipeline = load({"flops": 0.46, "text_tokens": 100}, stage)
    (count,) = counts(pipeline.bind(SHAPE))
    router = pipeline.stages[0].strategy.flops(SHAPE, 100, 576)

    def of(kept):
        dense = cost.prefill_flops(SHAPE, [676] * 32)
        return (cost.prefill_flops(SHAPE, [676] * 2 + [kept + 100] * 22) + router) / dense

    assert of(count) <= 0.46 < of(count + 1) and router > 0


def test_open_cuts_share_one_multiplier():
    stages = {"use": "divprune"}, {"use": "random", "at": 4}
    first, second = counts(load({"flops": 0.4}, *stages).bind(SHAPE))
    assert abs(first / 576 - second / first) < 1 / first

    def of(a, b):
        return flops([a] * 4 + [b] * 28)

    assert of(first, second) <= 0.4
    three = counts(load({"flops": 0.4}, {"use": "fastv", "at": [2, 8, 16]}).bind(SHAPE))
    assert len(three) == 3 and three == sorted(three, reverse=True)
    assert flops([576] * 2 + [three[0]] * 6 + [three[1]] * 8 + [three[2]] * 16) <= 0.4


def test_stages_that_say_how_much_they_keep_are_left_alone():
    pipeline = load({"flops": 0.3}, {"use": "divprune", "keep_tokens": 200}, {"use": "random", "at": 8})
    first, second = counts(pipeline.bind(SHAPE))
    assert first == 200 and flops([200] * 8 + [second] * 24) <= 0.3 < flops([200] * 8 + [second + 1] * 24)
    roomy = load({"flops": 0.9}, {"use": "divprune", "keep_tokens": 200}, {"use": "random", "at": 8})
    assert counts(roomy.bind(SHAPE)) == [200, 200]


@pytest.mark.parametrize(
    ("accounting", "fraction", "count"),
    [("kept_at_end", 0.25, 144), ("layer_mean", 0.5, 268), ("kv_bytes", 0.5, 234), ("kept_at_end", 1, 576)],
)
def test_other_accountings(accounting, fraction, count):
    """layer_mean: 2 * 576 + 30 k within 16 * 576; kv_bytes: 2 * 640 + 30 (k + 64) within 16 * 640."""
    (found,) = counts(load({accounting: fraction}, {"use": "random", "at": 2}).bind(SHAPE))
    assert found == count


def test_what_runs_is_what_was_promised():
    model = tiny_llava()
    pipeline = load({"flops": 0.7, "text_tokens": 10}, {"use": "random", "at": 2})
    with prunekit.apply(model, pipeline) as run:
        model(**tiny_inputs(images=(1,), text=9))
    (kept,) = run.report.kept_tokens
    assert run.report.cost.flops_fraction <= 0.7
    again = prunekit.load({"name": "c", "stages": [{"use": "random", "at": 2, "keep_tokens": kept + 1}]})
    with prunekit.apply(model, again) as run:
        model(**tiny_inputs(images=(1,), text=9))
    assert run.report.cost.flops_fraction > 0.7
    with prunekit.apply(model, pipeline) as run:  # another prompt keeps the same fraction
        model(**tiny_inputs(images=(2,), text=9))
    assert run.report.kept_tokens == (2 * kept,)


def test_the_budget_is_in_the_resolved_file_and_in_the_hash():
    one, two = (load({"flops": fraction}, {"use": "random"}) for fraction in (0.4, 0.5))
    assert one.sha != two.sha and "budget:\n  flops: 0.4\n  text_tokens: 64\n" in one.resolved
    assert "keep" not in one.resolved
    assert prunekit.load(one.resolved).sha == one.sha


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("budget: 0.4\nstages: [{use: random}]\n", r"1:9: budget: must be a mapping, not 0\.4 \(such as"),
        ("budget: {flop: 0.4}\nstages: [{use: random}]\n", "budget.flop: unknown key .did you mean 'flops'"),
        ("budget: {}\nstages: [{use: random}]\n", "budget: names no accounting"),
        ("budget: {flops: 0.4, kv_bytes: 0.3}\nstages: [{use: random}]\n", "budget: names 2 accountings"),
        ("budget: {flops: 40}\nstages: [{use: random}]\n", r"1:17: budget.flops: must be a fraction in \(0, 1\]"),
        ("budget: {flops: 0}\nstages: [{use: random}]\n", "budget.flops: must be a fraction"),
        ("budget: {flops: 0.4, text_tokens: 0}\nstages: [{use: random}]\n", "budget.text_tokens: must be a whole"),
        ("budget: {flops: 0.4, visual_tokens: x}\nstages: [{use: random}]\n", "budget.visual_tokens: must be a whole"),
        ("stages: [{use: random}]\n", "keep: is missing"),
        ("budget: {flops: 0.4}\nstages: [{use: random, keep_of: current}]\n", "keep_of: says what"),
    ],
)
def test_budgets_that_cannot_be_read(text, message):
    with pytest.raises(prunekit.SpecError, match=message):
        prunekit.load(text)


@pytest.mark.parametrize(
    ("budget", "stages", "message"),
    [
        ({"flops": 0.05}, [{"use": "random", "at": 2}], r"budget\.flops: 0\.05 cannot be reached: .* still 0\.15"),
        ({"flops": 0.5}, [{"use": "random", "keep": 0.5}], "budget: no stage is left open"),
        ({"flops": 0.5}, [{"use": "skip_layers", "layers": [3]}], "budget: no stage is left open"),
    ],
)
def test_budgets_that_cannot_be_met(budget, stages, message):
    with pytest.raises(prunekit.SpecError, match=message):
        load(budget, *stages).bind(SHAPE)


def test_a_later_stage_that_would_never_act_is_said():
    """The open stage gets what the budget allows; one behind it that may keep more has nothing left to do."""
    stages = {"use": "divprune"}, {"use": "random", "at": 8, "keep": 0.5}
    with pytest.warns(prunekit.PrunekitWarning, match=r"stages\[1\]\.keep: asks for 0\.5 of original, but with this "
                      r"budget stages\[0\] divprune leaves \d+ of 576 tokens \(keep less here"):  # fmt: skip
        idle = load({"flops": 0.3}, *stages).bind(SHAPE)
    first, second = counts(idle)
    assert first == second < 288
    with pytest.warns(prunekit.PrunekitWarning, match=r"stages\[1\]\.keep_tokens: asks for 300 tokens"):
        load({"flops": 0.3}, stages[0], {"use": "random", "at": 8, "keep_tokens": 300}).bind(SHAPE)
    first, second = counts(load({"flops": 0.6}, *stages).bind(SHAPE))
    assert first > second == 288


@pytest.mark.parametrize("wrong", [1.5, 0, "half"])
def test_a_budget_that_cannot_be_read_is_one_fault(wrong):
    """What the budget leaves open is not missing besides."""
    with pytest.raises(prunekit.SpecError) as refusal:
        load({"flops": wrong}, {"use": "fastv"}, {"use": "random", "at": 4})
    assert [fault.key for fault in refusal.value.faults] == ["budget.flops"]


def test_models_whose_tokens_depend_on_the_picture():
    shape = dataclasses.replace(SHAPE, visual_tokens=None)
    with pytest.raises(prunekit.SpecError, match=r"budget\.visual_tokens: is missing"):
        load({"flops": 0.5}, {"use": "random"}).bind(shape)
    bound = load({"flops": 0.5, "visual_tokens": 576}, {"use": "random"}).bind(shape)
    assert counts(bound) == counts(load({"flops": 0.5}, {"use": "random"}).bind(SHAPE))


def test_pipelines_with_a_budget_do_not_nest():
    model = tiny_llava()
    assert shape_of(model).visual_tokens == 16
    inner = load({"flops": 0.9}, {"use": "random", "at": 2})
    with (
        prunekit.apply(model, {"stages": [{"use": "stride", "keep": 0.5}]}),
        pytest.raises(prunekit.SpecError, match="for a whole pipeline"),
        prunekit.apply(model, inner),
    ):
        pass
