"""Decoders that are not known inside: tokens leave at their input, and they never knew of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from examples import registered

import prunekit
from prunekit import Keys, hookimpl, strategy
from prunekit.engine.attach import Attached
from prunekit.errors import SpecError, Unsupported
from prunekit.families import find, shape_of
from prunekit.families.base import Parts
from prunekit.pipeline.build import build
from prunekit.registry import Registry
from prunekit.testing import tiny_configs
from prunekit.testing.tiny_families import RECIPES, row_of, tiny_batch, tiny_model
from prunekit.upstream import CACHE
from prunekit.verify import proof
from prunekit.verify.comparison import compared
from prunekit.verify.equivalence import assert_equivalent, generate
from prunekit.verify.precision import Float64Throughout
from prunekit.verify.tiny_models import tiny_from_config

# One axis of positions, three, a deep stack, states beside attention.
FAMILIES = ("llava", "qwen2_vl", "qwen3_vl", "qwen3_5")
PIPELINES: dict[str, list[dict[str, Any]]] = {
    "drop": [{"use": "random", "keep": 0.7}, {"use": "divprune", "keep": 0.3}],
    "merge": [{"use": "ex_recycle", "at": "encoder", "keep": 0.4}],
    "tower": [{"use": "ex_loud", "at": "vision.0", "keep": 0.5}],
}
DROP = {"name": "drop", "stages": [{"use": "random", "keep": 0.5}]}


def closed(model: Any) -> Parts:
    """The parts of a model as if nothing were known of its decoder."""
    return replace(find(model), opaque="it is closed for this test", layers=(), rotary=None)


def with_decoder(kind: str, **more: Any) -> Any:
    """A LLaVA around another decoder."""
    decoder, tower = tiny_configs.text(6, model_type=kind, **more), tiny_configs.vision("clip_vision_model")
    return tiny_from_config(tiny_configs.config("llava", decoder, tower, image_seq_length=16, vision_feature_layer=-2))


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_a_prompt_that_never_held_what_left(family: str, name: str) -> None:
    model = tiny_model(family)
    with registered():
        pipeline = build({"name": name, "stages": PIPELINES[name]})
        compared(model, closed(model), pipeline, tiny_batch(model), 4, 1e-9)


def test_equal_to_cuts_inside_a_decoder_that_is_known() -> None:
    """Two engines and two references: the masks of the one are the shorter lists of the other."""
    model, pipeline = tiny_model("qwen2_5_vl"), build({"name": "drop", "stages": PIPELINES["drop"]})
    inputs = tiny_batch(model)
    known = compared(model, find(model), pipeline, inputs, 4, 1e-9)
    unknown = compared(model, closed(model), pipeline, inputs, 4, 1e-9)
    assert torch.allclose(known.logits, unknown.logits, atol=1e-11, rtol=0)
    assert known.report.kept_tokens == unknown.report.kept_tokens
    assert known.report.kv_tokens == unknown.report.kv_tokens


@pytest.mark.parametrize("kind", ["gpt_neox", "jamba"])
def test_decoders_of_other_makes_are_proved_and_cut(kind: str) -> None:
    model = with_decoder(kind)
    assert find(model).opaque
    found = proof.prove(model)
    assert found.holds and [case.name for case in found.cases] == [
        "nothing pruned", "tokens dropped at the decoder input",
    ]  # fmt: skip
    assert_equivalent(model, DROP, tiny_batch(model, recipe=RECIPES["llava"]), steps=4)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_decoding_by_hand_beams_and_look_ups(family: str) -> None:
    """What counts positions by the cache's length goes on counting the tokens that left."""
    model = tiny_model(family)
    batch = tiny_batch(model)
    compared(model, closed(model), build(DROP), batch, 3, 1e-9, num_beams=2)
    one = row_of(batch, 0)
    with Float64Throughout(), Attached(model, build(DROP), closed(model)):
        expected = generate(model, one, max_new_tokens=6)
        looked = generate(model, one, max_new_tokens=6, prompt_lookup_num_tokens=2)
        output, tokens = model(**one, use_cache=True), []
        for _ in range(6):
            tokens.append(output.logits[:, -1:].argmax(-1))
            output = model(input_ids=tokens[-1], use_cache=True, **{CACHE: output[CACHE]})
    length = one["input_ids"].shape[1]
    assert torch.equal(looked.sequences, expected.sequences)
    assert torch.equal(torch.cat(tokens, 1), expected.sequences[:, length:])


def test_rows_are_their_own_runs_and_the_model_is_left_as_it_was() -> None:
    model = tiny_model("llava")
    batch = tiny_batch(model)
    together = compared(model, closed(model), build(DROP), batch, 3, 1e-9)
    for row in range(2):
        alone = compared(model, closed(model), build(DROP), row_of(batch, row), 3, 1e-9)
        assert torch.allclose(alone.logits[0], together.logits[row], atol=1e-11, rtol=0)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a later site": (
        {"stages": [{"use": "random", "at": 2, "keep": 0.5}]}, "is inside a decoder that can be cut at its input only"
    ),

    "layers": ({"stages": [{"use": "skip_layers", "layers": [1]}]}, "plans layers, but this decoder"),
    "positions": (DROP | {"positions": "renumber"}, "at its input only"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_the_inside_is_refused_with_the_reason(name: str) -> None:
    data, reason = REFUSED[name]
    shape = shape_of(with_decoder("gpt_neox"))
    with registered(), pytest.raises(SpecError, match=reason) as caught:
        prunekit.load({"name": "refused", **data}).bind(shape)
    assert "has no `self_attn`" in str(caught.value)


def test_sizes_and_static_caches_are_refused() -> None:
    model = with_decoder("gpt_neox")
    inputs = tiny_batch(model, recipe=RECIPES["llava"])
    sizes = {"name": "sizes", "stages": [{"use": "ex_gather", "at": "encoder", "keep": 0.5}]}
    with (
        registered(), prunekit.apply(model, sizes),
        pytest.raises(Unsupported, match="token sizes add to attention logits, and this decoder"),
    ):  # fmt: skip
        generate(model, inputs, max_new_tokens=2)
    with prunekit.apply(model, DROP), pytest.raises(Unsupported, match="StaticCache"):
        generate(model, inputs, max_new_tokens=2, cache_implementation="static")


@strategy(inputs={"keys": Keys(layer="next")})
class Ahead:
    """Reads the first layer before it runs."""

    @hookimpl
    def score_tokens(self, keys: torch.Tensor) -> torch.Tensor:
        return keys.norm(dim=-1)


def test_what_reads_the_inside_is_refused() -> None:
    registry = Registry()
    registry.strategy("ahead", f"{Ahead.__module__}:Ahead")
    data = {"name": "ahead", "stages": [{"use": "ahead", "at": "encoder", "keep": 0.5}]}
    with pytest.raises(SpecError, match=r"asks for keys, but nothing is known inside this decoder: .*no `self_attn`"):
        build(data, registry=registry).bind(shape_of(with_decoder("gpt_neox")))


def test_a_router_that_plans_layers_is_refused() -> None:
    model = with_decoder("gpt_neox")
    with (
        registered(), prunekit.apply(model, {"name": "plans", "stages": [{"use": "ex_lots"}]}),
        pytest.raises(Unsupported, match=": route plans layers, but this decoder can be cut at its input only"),
    ):  # fmt: skip
        generate(model, tiny_batch(model, recipe=RECIPES["llava"]), max_new_tokens=2)


def test_flash_kernels_are_refused() -> None:
    model = tiny_model("llava")
    with pytest.raises(Unsupported, match="flash kernels read gaps in the positions of a shorter prompt"):
        model.model.language_model.config._attn_implementation = "flash_attention_2"
        Attached(model, build(DROP), closed(model)).attach()


def test_an_argument_that_cannot_be_cut_along_is_refused() -> None:
    """A table of integers with the prompt's length where no tokens are expected."""
    model = tiny_model("llava")
    inputs = tiny_batch(model)
    odd = torch.zeros(3, 4, inputs["input_ids"].shape[1], 2, dtype=torch.int64)
    with (
        Attached(model, build(DROP), closed(model)),
        pytest.raises(Unsupported, match=" of this decoder cannot be cut along with the tokens"),
    ):
        model(**inputs, odd=odd)
