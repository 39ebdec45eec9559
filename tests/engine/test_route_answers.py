"""What a router may answer, and what is refused of it, so that no budget is silently left unmet."""

from __future__ import annotations

import pytest
import torch

import prunekit
from prunekit import LayerAction, LayerPlan, Route, hookimpl, plugins, strategy
from prunekit.errors import PluginError
from prunekit.testing.tiny import tiny_inputs, tiny_llava

LAYERS = 6
ANSWERS = {}
LONG = 32  # tokens; the shorter row of `run` has less, the longer one more


@strategy()
class Says:
    """A router that answers what the test wants."""

    answer: str

    @hookimpl
    def route(self, embeds):
        return ANSWERS[self.answer](len(embeds), embeds.shape[1])


@strategy(keep="optional", keep_layers="refused")
class Plans(Says):
    pass


@strategy(per_sample=True, keep="optional", keep_layers="refused")
class OneByOne(Says):
    """The same, asked about each sample alone."""

    @hookimpl
    def route(self, embeds):
        return ANSWERS[self.answer](len(embeds))


class Plugin:
    @hookimpl
    def prunekit_register(self, registry):
        registry.strategy("one-by-one", f"{__name__}:OneByOne")
        registry.strategy("says", f"{__name__}:Says")
        registry.strategy("plans", f"{__name__}:Plans")


@pytest.fixture(autouse=True, scope="module")
def registered():
    plugins.register(Plugin(), "says")
    yield
    plugins.unregister("says")


@pytest.fixture(scope="module")
def model():
    return tiny_llava()


def answer(name):
    def register(function):
        ANSWERS[name] = function
        return function

    return register


answer("nothing")(lambda rows, length: Route())
answer("tokens")(lambda rows, length: Route(torch.arange(length).expand(rows, -1).float()))
answer("short tokens")(lambda rows, length: Route(torch.zeros(rows, 3)))
answer("layers")(lambda rows, length: Route(layers=torch.arange(LAYERS).expand(rows, -1).float()))
answer("few layers")(lambda rows, length: Route(layers=torch.zeros(rows, LAYERS - 1)))
answer("nan tokens")(lambda rows, length: Route(torch.full((rows, length), torch.nan)))
answer("integer tokens")(lambda rows, length: Route(torch.ones(rows, length, dtype=torch.int64)))
answer("infinite layers")(lambda rows, length: Route(layers=torch.full((rows, LAYERS), torch.inf)))
answer("none")(lambda rows, length: None)
answer("skip 1")(lambda rows, length: Route(plans=[LayerPlan({1: LayerAction.SKIP})] * rows))
answer("mlp 1")(lambda rows, length: Route(plans=[LayerPlan({1: LayerAction.SKIP_MLP})] * rows))
answer("skip 9")(lambda rows, length: Route(plans=[LayerPlan({9: LayerAction.SKIP})] * rows))
answer("one plan")(lambda rows, length: Route(plans=[LayerPlan()]))
answer("no plans")(lambda rows, length: Route(plans=[{1: LayerAction.SKIP}] * rows))
answer("plans of text")(lambda rows, length: Route(plans=[LayerPlan({1: "skip"})] * rows))
answer("tokens of one")(lambda length: Route(torch.arange(length).float()))
answer("tokens of a batch")(lambda length: Route(torch.zeros(1, length)))
answer("few layers of one")(lambda length: Route(torch.zeros(length), layers=torch.zeros(LAYERS - 1)))
answer("two plans of one")(lambda length: Route(plans=[LayerPlan(), LayerPlan()]))
answer("skip 1 of one")(lambda length: Route(plans=[LayerPlan({1: LayerAction.SKIP})]))
answer("plans of short ones")(lambda length: Route(plans=[LayerPlan({1: LayerAction.SKIP})] if length < LONG else None))
answer("raises")(lambda rows, length: 1 // 0)


def run(model, *stages):
    with prunekit.apply(model, {"stages": list(stages)}) as attached:
        model.generate(**tiny_inputs(images=(1, 2)), max_new_tokens=2, do_sample=False)
    return attached.report


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ([{"use": "says", "answer": "nothing", "keep": 0.5}], "has a token budget, but route returned no token scores"),
        ([{"use": "says", "answer": "layers", "keep": 0.5}], "has a token budget, but route returned no token scores"),
        (
            [{"use": "says", "answer": "tokens", "keep_layers": 3}],
            "has a budget of layers, but route returned no layer",
        ),
        ([{"use": "says", "answer": "short tokens", "keep": 0.5}], "route (tokens) must return a tensor of shape (2, "),
        (
            [{"use": "says", "answer": "few layers", "keep_layers": 3}],
            "must return a tensor of shape (2, 6), not (2, 5)",
        ),
        ([{"use": "says", "answer": "nan tokens", "keep": 0.5}], "route (tokens) returned NaN or infinity"),
        (
            [{"use": "says", "answer": "integer tokens", "keep": 0.5}],
            "route (tokens) must return float, not torch.int64",
        ),
        ([{"use": "says", "answer": "infinite layers", "keep_layers": 3}], "route (layers) returned NaN or infinity"),
        ([{"use": "says", "answer": "none", "keep": 0.5}], "route must return a Route, not NoneType"),
        ([{"use": "says", "answer": "raises", "keep": 0.5}], "route failed with ZeroDivisionError"),
        ([{"use": "says", "answer": "skip 1", "keep": 0.5}], "a budget of tokens alone (let the class decide about"),
        ([{"use": "says", "answer": "skip 1", "keep_layers": 5}], "returned plans, but the stage has `keep_layers`"),
        ([{"use": "plans", "answer": "skip 9"}], "route plans layers [9], but the model has layers 0 to 5"),
        ([{"use": "plans", "answer": "one plan"}], "route gave 1 plans for 2 samples"),
        ([{"use": "plans", "answer": "no plans"}], "each needs a LayerPlan"),
        ([{"use": "plans", "answer": "plans of text"}], "'skip' for layer 1 in `actions`; write LayerAction.SKIP"),
        ([{"use": "one-by-one", "answer": "tokens of a batch", "keep": 0.5}], "must return a tensor of shape ("),
        ([{"use": "one-by-one", "answer": "few layers of one", "keep": 0.5}], "of shape (6,), not (5,)"),
        ([{"use": "one-by-one", "answer": "two plans of one"}], "route gave 2 plans for one sample"),
        ([{"use": "one-by-one", "answer": "plans of short ones"}], "route gave plans for 1 of 2 samples"),
        (
            [{"use": "plans", "answer": "skip 1"}, {"use": "stride", "at": "1.mid", "keep": 0.5}],
            "layers [1] do not simply run, but other stages cut inside them",
        ),
        (
            [{"use": "plans", "answer": "mlp 1"}, {"use": "stride", "at": "1.mid", "keep": 0.5}],
            "layers [1] do not simply run, but other stages cut inside them",
        ),
        (
            [{"use": "skip_layers", "layers": [1], "what": "mlp"}, {"use": "plans", "answer": "skip 1"}],
            "route disagrees with another stage: layer 1: one stage says skip_mlp, another skip",
        ),
    ],
)
def test_refused(model, stages, said):
    with pytest.raises(PluginError) as caught:
        run(model, *stages)
    assert said in str(caught.value)
    assert f"stages[{next(i for i, s in enumerate(stages) if s['use'] in ('says', 'plans', 'one-by-one'))}]" in str(
        caught.value
    )


def test_taken(model):
    report = run(model, {"use": "says", "answer": "tokens", "keep": 0.25})
    assert report.kept_tokens == (4, 8) and not any(plan.layers for plan in report.plans)
    report = run(model, {"use": "says", "answer": "layers", "keep_layers": 0.5})
    assert all(dict(plan) == dict.fromkeys((0, 1, 2), LayerAction.SKIP) for plan in report.plans)
    report = run(model, {"use": "says", "answer": "layers", "keep_layers": 5}, {"use": "fastv", "at": 1, "keep": 0.5})
    assert all(dict(plan) == {1: LayerAction.SKIP} for plan in report.plans)  # layer 0 is read
    report = run(model, {"use": "plans", "answer": "mlp 1"}, {"use": "fastv", "at": 2, "keep": 0.5})
    assert all(dict(plan) == {1: LayerAction.SKIP_MLP} for plan in report.plans)
    report = run(model, {"use": "one-by-one", "answer": "tokens of one", "keep": 0.25})
    assert report.kept_tokens == (4, 8)
    report = run(model, {"use": "one-by-one", "answer": "skip 1 of one"})
    assert all(dict(plan) == {1: LayerAction.SKIP} for plan in report.plans)


def test_a_router_of_tokens_that_also_scores_layers_leaves_them_alone(model):
    report = run(model, {"use": "says", "answer": "both", "keep": 0.25})
    assert report.kept_tokens == (4, 8) and not any(plan.layers for plan in report.plans)


@answer("both")
def _both(rows, length):
    return Route(torch.zeros(rows, length), torch.zeros(rows, LAYERS))
