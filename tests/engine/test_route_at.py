"""Routers that are asked before a later layer: what they see, what they may decide, and that the rest is as it was."""

from __future__ import annotations

import pytest
import torch

import prunekit
from prunekit import LayerAction, LayerPlan, Route, hookimpl, plugins, strategy
from prunekit.errors import PluginError, SpecError
from prunekit.families import shape_of
from prunekit.testing.tiny import tiny_inputs, tiny_llava
from prunekit.testing.tiny_families import tiny_batch, tiny_model, tiny_names
from prunekit.training.forced import deciding
from prunekit.training.teacher import at_random
from prunekit.verify.equivalence import assert_equivalent, generate
from prunekit.verify.precision import Float64Throughout

LAYERS = 6
SEEN = []
ROWS = (("image",), (), ("image", "image"))
ALWAYS = ("llava", "qwen3_vl", "gemma3", "idefics3", "qwen3_5")


@strategy()
class Watches:
    """Scores by the size of states, and notes what it is given."""

    @hookimpl
    def route(self, embeds, visual, valid, shape):
        SEEN.append((embeds, visual, valid))
        layers = torch.arange(shape.layers, device=embeds.device).expand(len(embeds), -1)
        return Route(embeds.norm(dim=-1), layers.to(embeds.dtype))


@strategy(routes=("layers",), keep_layers="refused")
class Plans:
    """Plans one layer, whichever."""

    layer: int

    @hookimpl
    def route(self, embeds):
        return Route(plans=[LayerPlan({self.layer: LayerAction.SKIP})] * len(embeds))


class Plugin:
    @hookimpl
    def prunekit_register(self, registry):
        registry.strategy("watches", f"{__name__}:Watches")
        registry.strategy("plans", f"{__name__}:Plans")


@pytest.fixture(autouse=True, scope="module")
def registered():
    plugins.register(Plugin(), "watches")
    yield
    plugins.unregister("watches")


def load(*stages):
    return prunekit.load({"name": "p", "stages": list(stages)})


def watches(**keys):
    return {"use": "watches", "route_at": 3, "at": 3, "keep": 0.5, "keep_layers": 4} | keys


def run(model, pipeline, inputs):
    SEEN.clear()
    with Float64Throughout(), prunekit.apply(model, pipeline) as attached:
        generate(model, inputs, max_new_tokens=2)
    return attached.report


def faults(*stages, model=True):
    with pytest.raises(SpecError) as caught:
        pipeline = load(*stages)
        if model:
            pipeline.bind(shape_of(tiny_llava()))
    return str(caught.value)


def test_it_sees_the_states_that_enter_its_layer():
    model, inputs = tiny_llava(), tiny_inputs((1, 2), (9, 5))
    with Float64Throughout(), torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states
    report = run(model, load(watches()), inputs)
    ((embeds, visual, valid),) = SEEN
    real = inputs["attention_mask"].bool()
    assert torch.equal(valid, real) and visual.sum(1).tolist() == list(report.visual_tokens)
    assert (embeds - states[3])[real].abs().max() < 1e-9
    for row in range(2):
        norms = states[3][row][visual[row]].norm(dim=-1)
        best = norms.topk(len(norms) // 2).indices.sort().values
        assert list(report.events[0].kept[row]) == best.tolist()


def test_it_is_not_shown_what_has_left():
    model, inputs = tiny_llava(), tiny_inputs((1, 2), (9, 5))
    report = run(model, load({"use": "stride", "at": 1, "keep": 0.5}, watches(keep=0.25)), inputs)
    ((_, visual, valid),) = SEEN
    left = tuple(len(row) for row in report.events[0].kept)
    assert tuple(visual.sum(1).tolist()) == left < report.visual_tokens
    assert valid.sum(1).tolist() == [
        text - gone + count for text, gone, count in zip(report.prompt_tokens, report.visual_tokens, left, strict=True)
    ]


def test_layers_that_have_run_are_not_for_it_to_skip():
    model = tiny_llava()
    bound = load(watches()).bind(shape_of(model))
    assert bound.protected >= {0, 1, 2} and 3 not in bound.protected
    report = run(model, load(watches()), tiny_inputs((1,), (9,)))
    assert report.plans[0].layers == {3, 4}, "the lowest scores of those that are left"
    assert "keep at least 3" in faults(watches(keep_layers=2))


@pytest.mark.parametrize(
    "family",
    [pytest.param(one, marks=() if one in ALWAYS else pytest.mark.slow) for one in tiny_names()],
)
def test_decisions_of_each_sample_equal_masking(family):
    model = tiny_model(family)
    inputs = tiny_batch(model, ROWS)
    pipeline = load({"use": "random", "at": 1, "keep": 0.8}, watches(route_at=2, at=[2, 4], keep=[0.6, 0.3]))
    with deciding(pipeline.stages[1], at_random(LAYERS, [3, 1, 2])):
        report = assert_equivalent(model, pipeline, inputs, steps=4).report
    assert family not in ALWAYS or len({plan.layers for plan in report.plans}) > 1, "rows skip different layers"
    assert all(len(plan.layers) == 2 and min(plan.layers) >= 2 for plan in report.plans)


def test_forecast_and_report_count_its_own_work_where_it_is_asked():
    par = {"use": "par", "weights": None, "seed": 0, "width": 16, "protect": [], "at": 3, "keep": 0.25}
    model, inputs = tiny_llava(), tiny_inputs((1,), (9,))

    def decided(**keys):
        report = run(model, load({"use": "stride", "at": 1, "keep": 0.5}, par | keys), inputs)
        return report.cost.decision_flops[0]

    assert 0 < decided(route_at=3) < decided(), "fewer tokens reach it there"


def test_it_is_an_early_router_where_it_is_asked_at_the_input():
    model, inputs = tiny_llava(), tiny_inputs((1, 2), (9, 5))
    unsaid = {key: value for key, value in watches().items() if key != "route_at"}
    plain, named = load(unsaid), load(watches(route_at="encoder"))
    assert plain.sha == named.sha != load(watches()).sha and "route_at" not in plain.resolved
    assert run(model, plain, inputs) == run(model, named, inputs)
    again = prunekit.load(load(watches()).resolved)
    assert again.sha == load(watches()).sha and again.stages[0].route_at == prunekit.Site(3)


def test_without_visual_tokens_it_still_decides_about_layers():
    model = tiny_llava()
    with pytest.warns(prunekit.PrunekitWarning, match="no visual tokens"):
        report = run(model, load(watches()), tiny_inputs((0,), (9,)))
    assert report.plans[0].layers == {3, 4}


def test_it_may_be_asked_again_for_every_prompt():
    model, pipeline = tiny_llava(), load(watches())
    SEEN.clear()
    with prunekit.apply(model, pipeline):
        for text in (5, 9):
            generate(model, tiny_inputs((1,), (text,)), max_new_tokens=2)
    assert len(SEEN) == 2


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        (watches(route_at=9), "there is no layer 9: the model has layers 0 to 5"),
        (watches(route_at=4), "'watches' is only asked at '4', so no token can leave by it at '3' (name '4' or"),
        (watches(route_at="3.after"), "not at '3.after' (write 4)"),
        (watches(route_at="2.mid"), "a router is asked at the decoder input or before a layer, not at '2.mid'"),
        (watches(route_at="pixels"), "not at 'pixels'"),
        (watches(route_at="prefill_end"), "not at 'prefill_end'"),
        (watches(route_at=[2, 3]), "must be one site: a router decides once"),
        (watches(route_at="layer_3"), "write 3"),
        (watches(route_at=-1), "route_at"),
        ({"use": "fastv", "keep": 0.5, "route_at": 3}, "'fastv' is no router, so it takes no `route_at`"),
        ({"use": "skip_layers", "layers": [3], "route_at": 3}, "'skip_layers' is no router, so it takes no `route_at`"),
        (watches(rout_at=3), "did you mean 'route_at'"),
    ],
    ids=str,
)
def test_what_a_file_may_not_say(stage, said):
    assert said in faults(stage)


def test_stages_where_it_is_asked_stand_before_it():
    stride = {"use": "stride", "at": 3, "keep": 0.8}
    said = faults(watches(), stride, model=False)
    assert "'watches' routes after all other stages at '3', so also after this one (list it before" in said
    report = run(tiny_llava(), load(stride, watches()), tiny_inputs((1,), (9,)))
    assert [event.stage for event in report.events] == ["stride", "watches"]


def test_a_plan_of_a_layer_that_has_run():
    model, pipeline = tiny_llava(), load({"use": "plans", "layer": 1, "route_at": 2})
    with (
        prunekit.apply(model, pipeline),
        pytest.raises(PluginError, match=r"route plans layers \[1\], which have run: .* before layer 2"),
    ):
        generate(model, tiny_inputs((1,), (9,)), max_new_tokens=1)
    assert_equivalent(model, load({"use": "plans", "layer": 2, "route_at": 2}), tiny_inputs((1, 2), (9, 5)), steps=3)


def test_attention_that_a_later_router_leaves_out_cannot_be_read():
    model = tiny_llava()
    pipeline = load({"use": "plans", "layer": 3, "route_at": 2}, {"use": "fastv", "at": 4, "keep": 0.5})
    with prunekit.apply(model, pipeline), pytest.raises(prunekit.Unsupported, match="attention of layer 3"):
        generate(model, tiny_inputs((1,), (9,)), max_new_tokens=1)
