"""What hooks ask for and stages decide that cannot be, each refused by its own words before the layer it is about.

Where a check of the pipeline speaks first, or no installed model has the cause, the cause is simulated.
"""

# ruff: noqa: SIM117
from __future__ import annotations

import dataclasses
import re
from types import SimpleNamespace

import pytest
import torch
from refusing import FLASH, flash_kernel, inputs_of, model_of, refused
from torch import nn

import prunekit
from prunekit import LayerAction, LayerPlan, Rows, Selection, Sites, hookimpl
from prunekit.engine.attention import tap
from prunekit.engine.attention.attended import Attended
from prunekit.engine.decoder.aside import _rotary, _unrotated, phases
from prunekit.engine.decoder.prefill import Prefill
from prunekit.engine.decoder.readings import Needs, Readings
from prunekit.engine.tokens import masks
from prunekit.engine.tokens.layout import Layout
from prunekit.engine.tokens.positions import Rotations
from prunekit.errors import SpecError
from prunekit.families import find
from prunekit.pipeline import build
from prunekit.registry import Registry
from prunekit.testing.tiny_families import tiny_batch, tiny_model

EVERYWHERE = Sites(end=True)


@pytest.fixture(scope="module")
def model():
    return model_of()


def said(phrase):
    return pytest.raises(prunekit.Unsupported, match=re.escape(phrase))


def strategy(hook, **traits):
    """A strategy class with one hook, given as a function of self and what it asks for."""
    usual = {"plan_layers": {}, "route": {"keep": "refused", "keep_layers": "refused", "sites": EVERYWHERE}}
    declared = {**usual.get(hook.__name__, {"keep": "refused", "sites": EVERYWHERE}), **traits}
    return prunekit.strategy(**declared)(type("Strategy", (), {hook.__name__: hookimpl(hook)}))


def piped(*stages):
    """A pipeline of (strategy class, keys of its stage)."""
    registry = Registry()
    for number, (cls, _) in enumerate(stages):
        globals()[f"Strategy{number}"] = cls
        registry.strategy(f"s{number}", f"{__name__}:Strategy{number}")
    listed = [{"use": f"s{number}", **keys} for number, (_, keys) in enumerate(stages)]
    return build.build({"name": "refused", "stages": listed}, registry=registry)


def all_but_one(valid):
    return valid & (valid.cumsum(-1) < valid.sum(-1, True))


def reads(**asked):
    def select_tokens(self, attention, valid):
        return all_but_one(valid)

    return strategy(select_tokens, inputs={"attention": Rows(**asked)})


def runs(*layers):
    def select_tokens(self, forward, valid):
        forward(list(layers))
        return all_but_one(valid)

    return strategy(select_tokens)


def test_no_layer_can_be_run_inside_another(model):
    with refused(", but no layer can be run from '2.mid'", model, error=SpecError):
        with prunekit.apply(model, piped((runs(3), {"at": "2.mid"}))):
            pass


def test_layers_that_a_router_skips():
    """A router is held to the layers that are read before; the engine would tell too, before layer 0."""
    state = SimpleNamespace(actions=lambda number: (LayerAction.RUN, LayerAction.SKIP), has_visual=True)
    with said("a stage reads the attention of layer 1, which a router skips for some sample"):
        Readings(state, Needs(read=frozenset({1}))).check_plans()


def test_the_words_of_a_prompt_without_a_processor(model):
    def select_tokens(self, question, valid):
        return all_but_one(valid)

    with refused("asks for `question`, the user's words, which only the model's processor can read", model):
        with prunekit.apply(model, piped((strategy(select_tokens), {"at": 2}))):
            pass


def test_what_the_decoder_adds_between_its_layers():
    own = tiny_model("qwen3_vl", dtype=torch.float32)
    assert find(own).logical_until > 1
    with refused(", but this model adds features of its images in between", own, error=SpecError):
        with prunekit.apply(own, piped((reads(layer="next"), {"at": "0.after"}))):
            pass
    with prunekit.apply(own, piped((runs(0, 1), {"at": 0}))):
        with refused("forward cannot go on after layer 0: this model adds features of images", own, after=1):
            own(**tiny_batch(own))


def test_a_kind_of_layer_that_has_not_run():
    own = tiny_model("gemma3", dtype=torch.float32)
    full = find(own).text.config.layer_types.index("full_attention")
    with refused(", but no layer of its kind, full_attention, has run before", own, error=SpecError):
        with prunekit.apply(own, piped((reads(layer="next"), {"at": f"{full - 1}.after"}))):
            pass
    with prunekit.apply(own, piped((runs(full), {"at": 0}))):
        with refused("cannot be looked at yet: no layer of its kind, full_attention, has run before", own):
            own(**tiny_batch(own))


def test_attention_that_is_not_known():
    """No family has them: kernels that add more to their logits, other kinds of masks, kernels from elsewhere."""
    one, module = torch.zeros(1, 2, 3, 4), nn.Identity()
    with said("attention rows and keys are not available with a object as mask"):
        Attended.of(module, one, one, one, object(), {})
    with said("attention rows and keys are not available where attention has a position_bias"):
        Attended.of(module, one, one, one, None, {"position_bias": one})
    with said("it does not take its kernel from transformers' AttentionInterface; use stages that need none"):
        _ = tap.Record(module).result
    with said("rope=False is not available for this model: its layers do not get their rotation as (cos, sin)"):
        _unrotated({"position_embeddings": one})
    with said("undecay=True is not available for this model"):
        _rotary({"position_embeddings": one}, "undecay=True")
    axes = torch.ones(3, 1, 2, 4)
    with said("undecay=True is not available for this model: its rotation mixes several axes of positions"):
        phases(SimpleNamespace(arguments=lambda hidden: {"position_embeddings": (axes, axes)}), one, 4)


def test_a_version_without_the_interface(model, monkeypatch):
    monkeypatch.setattr(tap, "METHOD", "get_kernel")
    phrase = "this transformers version has no AttentionInterface.get_kernel"
    with refused(phrase, model), prunekit.apply(model, piped((reads(), {"at": 2}))):
        pass


def test_rotations_from_elsewhere():
    """No family has them: layers whose rotation their decoder's rotary module did not make."""
    with said("positions cannot be renumbered for this model"):
        Rotations()._of(object())
    with said("rotary is not known of this model"):
        Rotations().by_axis(object())


def test_a_decoder_without_its_final_norm(model):
    parts = dataclasses.replace(find(model), norm="last_norm")
    with said("decoder has no final norm 'last_norm', for which a hook asks"):
        _ = parts.final_norm


def test_cutting_inside_a_layer_that_does_not_simply_run(model):
    """Routers keep such layers; a plan of a stage is told in the file."""
    with said(", which does not simply run for every sample; move the cut"):
        Prefill._run_with_cuts(None, (), SimpleNamespace(number=2), (LayerAction.RUN, LayerAction.SKIP), None)


def test_cutting_between_what_runs_side_by_side():
    own = tiny_model("cohere2_vision", dtype=torch.float32)
    loud = {"stages": [{"use": "random", "at": "2.mid", "keep": 0.5}]}
    with refused("have no state between attention and MLP that could be cut", own, error=SpecError):
        with prunekit.apply(own, loud):
            pass


@pytest.fixture
def flash():
    own = model_of()
    with flash_kernel():
        own.config.text_config._attn_implementation = FLASH
        yield own


def test_sizes_under_flash_attention(flash):
    def select_tokens(self, valid):
        return Selection(all_but_one(valid), sizes=1.0 + valid)

    for at in (0, 2):
        with prunekit.apply(flash, piped((strategy(select_tokens), {"at": at}))):
            with refused("token sizes add to attention logits, which flash kernels do not take", flash, after=at):
                flash(**inputs_of())


def test_freezing_under_flash_attention(flash):
    def plan_layers(self, shape):
        return LayerPlan({1: LayerAction.FREEZE})

    plan = prunekit.strategy()(type("Strategy", (), {"plan_layers": hookimpl(plan_layers)}))
    with refused("for which a layer needs a mask that flash kernels do not take", flash, error=SpecError):
        with prunekit.apply(flash, piped((plan, {}))):
            pass
    ids = torch.ones(1, 4, dtype=torch.int64)
    with said("frozen visual tokens need a mask that flash kernels do not take"):
        masks.prefill_mask(None, Layout.full(ids), Layout.full(ids), ids, "flat")


def test_plans_that_differ_on_a_static_cache(model):
    from prunekit import Route

    def route(self, shape):
        return Route(plans=[LayerPlan(), LayerPlan({1: LayerAction.SKIP})])

    router = strategy(route, routes=("layers",), sites=Sites())
    with prunekit.apply(model, piped((router, {}))):
        with refused("on a static cache all samples of a batch must run the same layers", model, after=1):
            model.generate(**inputs_of((1, 1), (9, 9)), max_new_tokens=2, cache_implementation="static")
