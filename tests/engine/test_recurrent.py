"""Layers that hold a state in place of keys and values: what is exact there, what is refused, and what it costs."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import pytest
import torch
from examples import registered
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

import prunekit
from prunekit import cost, families, upstream
from prunekit.engine.cache.recurrent import RecurrentLayer
from prunekit.engine.decoder.layer_call import LayerCall
from prunekit.errors import SpecError, Unsupported
from prunekit.testing import tiny_configs
from prunekit.testing.tiny_families import RECIPES, tiny_batch, tiny_model
from prunekit.upstream import CACHE, RECURRENT_LAYER
from prunekit.verify.equivalence import assert_equivalent, generate
from prunekit.verify.precision import Float64Throughout
from prunekit.verify.tiny_models import tiny_from_config

pytestmark = pytest.mark.skipif(RECURRENT_LAYER is None, reason="transformers before 5.14")
RAGGED = (("image",), ("image", "image"))
CONVOLUTIONS = ["conv", "full_attention", "full_attention", "conv", "conv", "full_attention"]
HALF = {"use": "random", "keep": 0.5}
PIPELINES: dict[str, list[dict[str, Any]]] = {
    "cuts": [HALF | {"keep": 0.7}, {"use": "fastv", "at": 3, "keep": 0.5}, {"use": "stride", "at": 4, "keep": 0.2}],
    "skips": [HALF, {"use": "skip_layers", "layers": [0, 4]}],
    "attention": [{"use": "skip_layers", "layers": [0, 2], "what": "attention"}, HALF | {"at": 2}],
    "mlp": [{"use": "skip_layers", "layers": [3, 4], "what": "mlp"}, HALF | {"at": 1}],
    "prefill": [{"use": "skip_layers", "layers": [0, 3], "phase": "prefill"}],
}


@cache
def convolutions(attention: str = "sdpa") -> Any:
    """A LLaVA whose decoder is an LFM2: short convolutions beside attention."""
    decoder = tiny_configs.text(
        6, model_type="lfm2", layer_types=CONVOLUTIONS, conv_L_cache=3, block_auto_adjust_ff_dim=False
    )
    tower = tiny_configs.vision("clip_vision_model")
    config = tiny_configs.config("llava", decoder, tower, image_seq_length=16, vision_feature_layer=-2)
    return tiny_from_config(config, attention)


@cache
def delta_nets() -> Any:
    return tiny_model("qwen3_5")


MODELS = {"convolutions": convolutions, "delta nets": delta_nets}


def batch_of(model: Any) -> Any:
    return tiny_batch(model, RAGGED, recipe=RECIPES[model.config.model_type])


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", PIPELINES)
def test_equal_to_lists_that_become_shorter(kind: str, name: str) -> None:
    model = MODELS[kind]()
    assert_equivalent(model, {"name": name, "stages": PIPELINES[name]}, batch_of(model), steps=5)


@pytest.mark.parametrize("kind", MODELS)
def test_the_reference_sees_fillings_that_are_not_zero(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of the batch keep different numbers of tokens: without the padding mask a state takes in fillings."""
    model, mask = MODELS[kind](), LayerCall._mask

    def unmasked(self: LayerCall, queries: Any) -> Any:
        return mask(self, queries) if self.forward_pass.state.parts.attends(self.number) else None

    monkeypatch.setattr(LayerCall, "_mask", unmasked)
    with pytest.raises(AssertionError, match="differ from the masked reference"):
        assert_equivalent(model, {"name": "cut", "stages": PIPELINES["cuts"]}, batch_of(model), steps=2)


def test_a_skipped_layer_keeps_its_state_empty() -> None:
    model = delta_nets()
    with prunekit.apply(model, {"name": "skip", "stages": [{"use": "skip_layers", "layers": [0]}]}) as run:
        layer = generate(model, batch_of(model), max_new_tokens=3)[CACHE].layers[0]
    assert isinstance(layer, RecurrentLayer) and not any(layer.has_previous_state.values())
    assert run.report is not None and run.report.kv_tokens[0][0] == 0


def test_beams_and_several_new_tokens_at_once() -> None:
    model = convolutions()
    assert_equivalent(model, {"name": "beams", "stages": PIPELINES["cuts"]}, batch_of(model), steps=4, num_beams=2)
    with prunekit.apply(model, {"name": "lookup", "stages": PIPELINES["cuts"]}), Float64Throughout():
        one = tiny_batch(model, (("image",),), recipe=RECIPES["llava"])
        plain = generate(model, one, max_new_tokens=8).sequences
        looked = generate(model, one, max_new_tokens=8, prompt_lookup_num_tokens=3).sequences
    assert torch.equal(plain, looked)


REFUSED: dict[str, tuple[list[dict[str, Any]], str]] = {
    "attention of a state": (
        [{"use": "fastv", "at": 1, "keep": 0.5}], ", which holds a recurrent state (linear_attention) instead",
    ),
    "frozen tokens": ([{"use": "freeze_layers", "layers": [0]}], "of which layers 0 have none"),
    "keys filled in": (
        [{"use": "skip_layers", "layers": [3], "phase": "prefill", "fill_kv": True}], "of which layers 3 have none",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_keys_and_values_is_refused(name: str) -> None:
    stages, reason = REFUSED[name]
    with pytest.raises(SpecError, match=re.escape(reason)):
        prunekit.load({"name": "refused", "stages": stages}).bind(families.shape_of(delta_nets()))


def test_a_cache_that_knows_no_layers_is_refused() -> None:
    model = delta_nets()
    stages = [{"use": "random", "keep": 0.5}]
    with (
        pytest.raises(Unsupported, match="this cache does not know which layers hold a recurrent state"),
        prunekit.apply(model, {"name": "cut", "stages": stages}),
    ):
        model(**batch_of(model), **{CACHE: DynamicCache()})


def test_rows_that_run_different_layers_cannot_be_rolled_back() -> None:
    """`generate` asks before it records what has passed; whoever records without asking is refused."""
    model, routed = convolutions(), {"use": "ex_par", "at": 1, "keep": 0.5, "keep_layers": 4}
    batch = batch_of(model)
    with registered(), prunekit.apply(model, {"name": "routed", "stages": [routed]}):
        kv: Any = model(**batch, use_cache=True)[CACHE]
        assert not kv.is_croppable
        kv.activate_past_recording()
        seen = torch.cat([batch["attention_mask"], torch.ones(2, 1, dtype=torch.int64)], 1)
        with pytest.raises(Unsupported, match="cannot be rolled back on layers with a state"):
            model(input_ids=torch.full((2, 1), 20), attention_mask=seen, **{CACHE: kv})


def test_a_static_cache_is_refused() -> None:
    model = convolutions()
    with (
        prunekit.apply(model, {"name": "cut", "stages": [HALF]}),
        pytest.raises(Unsupported, match="pruning needs transformers' DynamicCache with layers of attention"),
    ):
        generate(model, batch_of(model), max_new_tokens=4, cache_implementation="static")


def test_older_versions_refuse_recurrent_states(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "RECURRENT_LAYER", None)
    assert "which are cut along from transformers 5.14 on" in str(families.find(convolutions()).opaque)


def test_flops_are_those_of_the_matrix_products() -> None:
    """Convolutions aside, which kernels pad, and for which the counter sees what the fallback computes."""
    model = convolutions("eager")
    inputs = tiny_batch(model, (("image",),), recipe=RECIPES["llava"])
    tokens = inputs["input_ids"].shape[1]
    with FlopCounterMode(display=False) as counter:
        model.model.language_model(inputs_embeds=torch.zeros(1, tokens, 32, dtype=torch.float64), use_cache=False)
    counted = counter.get_flop_counts()["Global"]
    convolved = sum(flops for op, flops in counted.items() if "convolution" in str(op))
    shape = families.shape_of(model)
    kernels = 2 * tokens * len(shape.recurrent) * 3 * shape.hidden
    assert convolved > 0
    assert sum(counted.values()) - convolved == cost.prefill_flops(shape, [tokens] * 6) - kernels
