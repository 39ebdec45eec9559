"""Leaving `apply` leaves the model as it was, bit for bit and attribute for attribute, whatever happened inside."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from cases import PIPELINES, pipeline
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import prunekit
from prunekit.testing.tiny import tiny_inputs, tiny_llava
from prunekit.verify.equivalence import generate

SPEC = pipeline("divprune-fastv-skip")


def snapshot(model):
    """Everything that an engine could leave behind, comparable with ==."""
    modules = dict(model.named_modules())
    state = model.state_dict()
    modeling = sys.modules[type(model.get_decoder()).__module__]
    return {
        "weights": {name: (tensor.data_ptr(), tensor.sum().item(), tensor.dtype) for name, tensor in state.items()},
        "types": {name: type(module) for name, module in modules.items()},
        "attributes": {name: sorted(vars(module)) for name, module in modules.items()},
        "objects": {
            name: {key: id(value) for key, value in vars(module).items() if not key.startswith("_")}
            for name, module in modules.items()
        },
        "hooks": {
            name: [list(getattr(module, kind)) for kind in vars(module) if kind.endswith("_hooks")]
            for name, module in modules.items()
        },
        "forward": {name: module.forward.__func__ for name, module in modules.items()},
        "classes": {
            kind: {key: id(value) for key, value in vars(kind).items() if callable(value)}
            for kind in {type(module) for module in modules.values()}
        },
        "registry": {name: id(ALL_ATTENTION_FUNCTIONS[name]) for name in sorted(ALL_ATTENTION_FUNCTIONS)},
        "local registry": dict(getattr(ALL_ATTENTION_FUNCTIONS, "_local_mapping", {})),
        "functions": {key: id(value) for key, value in vars(modeling).items() if callable(value)},
        "implementation": [m.config._attn_implementation for m in modules.values() if hasattr(m, "config")],
        "generation": model.generation_config.to_json_string(),
        "config": model.config.to_json_string(),
    }  # fmt: skip


@pytest.fixture(params=["sdpa", "eager"])
def model(request, tmp_path):
    model = tiny_llava(request.param, dtype=torch.float32)
    # Transformers puts hooks of its own on at first use, and writes into the config when it saves.
    generate(model, tiny_inputs(dtype=torch.float32), max_new_tokens=2)
    model.save_pretrained(tmp_path)
    return model


@pytest.fixture(autouse=True)
def unchanged(model):
    """Around every test here: the model is the same afterwards, and computes the same bits."""
    inputs = tiny_inputs((1, 2), (9, 4), dtype=torch.float32)
    before, logits = snapshot(model), model(**inputs).logits
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    yield
    after = snapshot(model)
    for kind in before:
        assert before[kind] == after[kind], kind
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(logits, model(**inputs).logits)


@pytest.mark.parametrize("name", PIPELINES)
def test_after_a_run(model, name):
    with prunekit.apply(model, pipeline(name)):
        generate(model, tiny_inputs((1, 2, 1), (14, 6, 9), dtype=torch.float32), max_new_tokens=3)


def test_after_nothing(model):
    with prunekit.apply(model, SPEC) as run:
        pass
    assert run.report is None


def test_after_an_exception_in_the_block(model):
    with pytest.raises(KeyboardInterrupt), prunekit.apply(model, SPEC):
        generate(model, tiny_inputs(dtype=torch.float32), max_new_tokens=2)
        raise KeyboardInterrupt


@pytest.mark.parametrize("layer", [0, 2, 5])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_after_an_exception_inside_a_layer(model, layer, phase):
    def explode(module, given):
        if (given[0].shape[1] == 1) == (phase == "decode"):
            raise RuntimeError("out of memory")

    handle = model.get_decoder().layers[layer].mlp.register_forward_pre_hook(explode)
    inputs = tiny_inputs(dtype=torch.float32)
    try:
        with pytest.raises(RuntimeError, match="out of memory"), prunekit.apply(model, SPEC):
            generate(model, inputs, max_new_tokens=3)
    finally:
        handle.remove()
    dense = generate(model, inputs, max_new_tokens=3)
    assert torch.equal(dense.sequences, generate(model, inputs, max_new_tokens=3).sequences)


def test_a_caught_exception_inside_the_block_does_not_poison_the_next_run(model):
    inputs = tiny_inputs((1, 2), (9, 4), dtype=torch.float32)
    with prunekit.apply(model, SPEC):
        expected = generate(model, inputs, max_new_tokens=4).sequences
    with prunekit.apply(model, SPEC):
        handle = model.get_decoder().layers[2].mlp.register_forward_pre_hook(_fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            generate(model, inputs, max_new_tokens=4)
        handle.remove()
        assert torch.equal(generate(model, inputs, max_new_tokens=4).sequences, expected)


def test_after_a_failing_strategy(model):
    built = prunekit.load(SPEC)

    class Broken:
        @prunekit.hookimpl(tryfirst=True)
        def score_tokens(self):
            raise ZeroDivisionError("no tokens")

    built.stages[1].manager.register(Broken())
    with (
        pytest.raises(prunekit.PrunekitError, match=r"stages\[1\] fastv.*ZeroDivisionError"),
        prunekit.apply(model, built),
    ):
        generate(model, tiny_inputs(dtype=torch.float32), max_new_tokens=2)


def test_after_a_refused_pipeline(model):
    with (
        pytest.raises(prunekit.SpecError, match="99"),
        prunekit.apply(model, {"name": "far", "stages": [{"use": "skip_layers", "layers": [99]}]}),
    ):
        pytest.fail("the block must not run")


def test_nested_apply_acts_as_one_pipeline(model):
    inputs, late = tiny_inputs((1, 2), dtype=torch.float32), {"stages": [{"use": "random", "at": 4, "keep": 0.1}]}
    early = {"stages": [{"use": "divprune", "keep": 0.5}, {"use": "skip_layers", "layers": [5]}]}
    before = snapshot(model)
    with prunekit.apply(model, {"stages": [*early["stages"], *late["stages"]]}) as run:
        both = generate(model, inputs, max_new_tokens=4).sequences
        events = run.report.events
    with prunekit.apply(model, late) as outer:
        alone = generate(model, inputs, max_new_tokens=4).sequences
        with prunekit.apply(model, early) as inner:
            assert torch.equal(generate(model, inputs, max_new_tokens=4).sequences, both)
            combined = {"divprune": 1, "random": 2}  # the order of the data; what acts at no site comes first
            assert inner.report.events == tuple(replace(event, index=combined[event.stage]) for event in events)
        assert torch.equal(generate(model, inputs, max_new_tokens=4).sequences, alone)
        assert len(outer.report.events) == 1
    assert snapshot(model) == before


def test_nested_apply_that_does_not_fit_leaves_the_outer_one(model):
    inputs = tiny_inputs(dtype=torch.float32)
    with prunekit.apply(model, SPEC) as run:
        expected = generate(model, inputs, max_new_tokens=4).sequences
        renumbered = {"positions": "renumber", "stages": [{"use": "random", "keep": 0.9}]}
        for other, reason in ((pipeline("blind"), "leaves no visual tokens"), (renumbered, "positions")):
            with pytest.raises(prunekit.SpecError, match=reason), prunekit.apply(model, other):
                pytest.fail("the block must not run")
        assert torch.equal(generate(model, inputs, max_new_tokens=4).sequences, expected)
        assert len(run.report.events) == 2


def test_two_models_at_once(model):
    other, inputs = tiny_llava(seed=1, dtype=torch.float32), tiny_inputs(dtype=torch.float32)
    with prunekit.apply(other, SPEC):
        alone = generate(other, inputs, max_new_tokens=4).sequences
    with prunekit.apply(model, pipeline("vtw")) as first, prunekit.apply(other, SPEC) as second:
        generate(model, inputs, max_new_tokens=4)
        assert torch.equal(generate(other, inputs, max_new_tokens=4).sequences, alone)
    assert (first.report.pipeline, second.report.pipeline) == ("vtw", "divprune-fastv-skip")


def test_state_dict_and_saving_inside(model, tmp_path):
    before = model.state_dict()
    with prunekit.apply(model, SPEC):
        inside = model.state_dict()
        assert list(inside) == list(before)
        assert all(torch.equal(inside[name], before[name]) for name in before)
        model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in before.items())


def _fail(module, given):
    raise RuntimeError("out of memory")
