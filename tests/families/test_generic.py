"""Models without a family file: recognised and proved, or refused with what they lack. Known ones are hidden."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration

import prunekit
import prunekit.families
from prunekit.errors import Unsupported
from prunekit.families import generic, shape_of
from prunekit.plugins import manager
from prunekit.testing.tiny_configs import CONFIGS
from prunekit.testing.tiny_families import RECIPES, ROWS, tiny_batch, tiny_from_config, tiny_model, tiny_names
from prunekit.verify import proof, twin
from prunekit.verify.equivalence import assert_equivalent

PIPELINE = {"name": "p", "stages": [{"use": "random", "at": "encoder", "keep": 0.5}, {"use": "fastv", "keep": 0.2}]}
QUICK = ("llava", "llava_next_video", "qwen3_vl", "gemma3", "smolvlm", "mistral3", "aya_vision")
# Videos of these stand behind the id of images, which nothing in their configs says.
UNGUESSED = ("glm4v", "glm46v", "glm4v_moe")


@pytest.fixture(autouse=True)
def hidden(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No family is known; nothing has been proved yet."""
    monkeypatch.setattr(prunekit.families, "families", lambda: ())
    proof._prove.cache_clear()
    yield
    proof._prove.cache_clear()


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name in tiny_names()
        if name not in UNGUESSED
    ],
)
def test_a_hidden_family_is_proved(family: str) -> None:
    found = proof.prove(CONFIGS[family](6))
    assert found.holds, found
    assert len(found.cases) == 6 + found.observed.cuts_inside and all(
        case.error is not None and case.error < 1e-9 for case in found.cases
    )
    assert found.observed.logical_until == (2 if family.startswith("qwen3_vl") else 0)


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3", "idefics3"])
def test_what_was_proved_prunes_exactly(family: str) -> None:
    model = tiny_model(family)
    rows = (("image", "image"), ("video",)) if RECIPES[family].video else ROWS
    inputs = tiny_batch(model, rows)
    found = assert_equivalent(model, PIPELINE, inputs, steps=2)
    assert all(few < many for few, many in zip(found.report.kept_tokens, found.report.visual_tokens, strict=True))


@pytest.mark.parametrize("family", UNGUESSED)
def test_what_cannot_be_fed_is_refused(family: str) -> None:
    with pytest.raises(Unsupported, match=r"runs on none of the inputs.*Video features and video tokens do not match"):
        proof.proved_parts(tiny_model(family, dtype=torch.float32))


def test_the_proof_runs_once_for_each_config(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    real = twin.twin_of
    monkeypatch.setattr(proof, "twin_of", lambda config: made.append(config) or real(config))
    models = [
        tiny_model("llava", dtype=torch.float32, layers=layers, seed=seed) for layers, seed in ((4, 0), (4, 1), (5, 0))
    ]
    before = torch.random.get_rng_state()
    for model in models:
        proof.proved_parts(model)
    assert len(made) == 2
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_shape_needs_no_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "prove", None)
    shape = shape_of(tiny_model("gemma3", dtype=torch.float32).to("meta"))
    assert (shape.family, shape.layers, shape.visual_tokens) == ("generic:gemma3", 6, None)


def test_observers_hear_nothing_of_the_twin() -> None:
    heard = []

    class Observer:
        @prunekit.hookimpl
        def prunekit_run_finished(self, report: Any) -> None:
            heard.append(report)

    manager().register(Observer(), name="listener")
    try:
        assert proof.prove(CONFIGS["llava"](6)).holds
    finally:
        manager().unregister(name="listener")
    assert heard == []


def test_coordinates_are_refused() -> None:
    model = tiny_model("llava")
    pool = {"name": "pool", "stages": [{"use": "pool", "keep": 0.25}]}
    inputs = tiny_batch(model)
    with (
        pytest.raises(Unsupported, match="where visual tokens are in their images is not known"),
        prunekit.apply(model, pool),
    ):
        model(**inputs)


class Odd(LlavaForConditionalGeneration):  # type: ignore[misc]
    """A LLaVA whose decoder is not what its modules look like."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        change = {"scales": _scales, "tuples": _tuples, "leaves out": _leaves_out, "mixes": _mixes}[config.oddity]
        change(self.model.language_model)


def _scales(text: Any) -> None:
    """Its states grow after every layer, in the loop."""
    for layer in text.layers:
        layer.register_forward_pre_hook(lambda _, given: (given[0] * 1.01, *given[1:]), prepend=True)


def _tuples(text: Any) -> None:
    for layer in text.layers:
        layer.register_forward_hook(lambda _, given, result: (result, None))


def _leaves_out(text: Any) -> None:
    """The last layer never runs."""
    text.config.num_hidden_layers -= 1


def _mixes(text: Any) -> None:
    """Each token also takes the mean of all: what is dropped would be missed."""
    layer = text.layers[3]
    original = layer.mlp.forward
    layer.mlp.forward = lambda state: original(state + state.mean(1, keepdim=True))


@pytest.mark.parametrize(
    ("oddity", "reason"),
    [
        ("scales", "changes hidden states between all layers"),
        ("tuples", "return more than the hidden states|runs on none"),
        ("leaves out", "called 4 layers of 5"),
        ("mixes", r"is not pruned exactly.*tokens dropped at the decoder input.*differ from the masked reference"),
    ],
)
def test_odd_models_are_refused(oddity: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CONFIGS["llava"](6)
    config.oddity = oddity
    monkeypatch.setattr(twin, "tiny_from_config", odd_from_config)
    model = odd_from_config(config)
    with pytest.raises(Unsupported, match=re.compile(reason, re.DOTALL)), prunekit.apply(model, PIPELINE):
        pass


def odd_from_config(config: Any, attention: str = "sdpa") -> Any:
    plain = tiny_from_config(config, attention)
    odd = Odd(plain.config).to(plain.dtype).eval().requires_grad_(False)
    odd.load_state_dict(plain.state_dict())
    odd.generation_config = plain.generation_config
    return odd


def _no_method(model: Any) -> None:
    model.model.get_image_features = None


def _no_id(model: Any) -> None:
    vars(model.config)["image_token_index"] = None


def _no_decoder(model: Any) -> None:
    model.get_decoder = lambda: model


def _two_things(model: Any) -> None:
    _no_method(model)
    vars(model.config)["image_token_index"] = None


@pytest.mark.parametrize(
    ("change", "reasons"),
    [
        (_no_method, ["its base model has no `get_image_features`"]),
        (_no_id, ["its config names no `image_token_id`"]),
        (_no_decoder, ["`get_decoder` gives no decoder stack"]),
        (_two_things, ["its base model has no `get_image_features`", "its config names no `image_token_id`"]),
    ],
)
def test_all_that_is_missing_is_said(change: Any, reasons: list[str]) -> None:
    model = tiny_model("llava", dtype=torch.float32)
    change(model)
    with pytest.raises(Unsupported) as refusal:
        generic.recognise(model)
    assert all(reason in str(refusal.value) for reason in reasons)
    assert "docs/families.md" in str(refusal.value)
