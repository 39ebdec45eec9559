"""Models without a family file: recognised and proved, or refused with what they lack. Known ones are hidden."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, LlavaForConditionalGeneration
from transformers.models.llama.modeling_llama import LlamaMLP

import prunekit
import prunekit.families
from prunekit.engine.attach import Attached
from prunekit.errors import Unsupported
from prunekit.families import families, generic, shape_of
from prunekit.plugins import manager
from prunekit.testing.tiny_configs import CONFIGS
from prunekit.testing.tiny_families import RECIPES, ROWS, encode, tiny_batch, tiny_model, tiny_names
from prunekit.verify import proof, twin
from prunekit.verify.equivalence import assert_equivalent

PIPELINE = {"name": "p", "stages": [{"use": "random", "at": "encoder", "keep": 0.5}, {"use": "fastv", "keep": 0.2}]}
QUICK = ("llava", "llava_next_video", "qwen3_vl", "gemma3", "smolvlm", "mistral3", "aya_vision")
FILES = {kind: family for family in families() for kind in family.model_types}


@pytest.fixture(autouse=True)
def hidden(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No family is known; nothing has been proved yet."""
    monkeypatch.setattr(prunekit.families, "families", lambda: ())
    proof._PROOFS.clear()
    yield
    proof._PROOFS.clear()


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in tiny_names()]
)
def test_a_hidden_family_is_proved(family: str) -> None:
    model = tiny_model(family, dtype=torch.float32)
    found = proof.prove(model)
    assert found.holds, found
    assert len(found.cases) == 6 + found.observed.cuts_inside
    assert all(case.error is not None and case.error < 1e-9 for case in found.cases)
    assert found.observed.logical_until == (2 if family.startswith("qwen3_vl") else 0)
    assert found.observed.kinds == (("image", "video") if RECIPES[family].video else ("image",))
    assert found.observed.shared_id == family.startswith("glm")
    parts = proof.proved_parts(model)
    assert set(parts.visual_ids) == set(FILES[family].parts(model).visual_ids)


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3", "idefics3"])
def test_what_was_proved_prunes_exactly(family: str) -> None:
    model = tiny_model(family)
    rows = (("image", "image"), ("video",)) if RECIPES[family].video else ROWS
    inputs = tiny_batch(model, rows)
    found = assert_equivalent(model, PIPELINE, inputs, steps=2)
    assert all(few < many for few, many in zip(found.report.kept_tokens, found.report.visual_tokens, strict=True))


def test_the_proof_runs_once_for_each_config(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    real = twin.twin_of
    monkeypatch.setattr(proof, "twin_of", lambda model: made.append(model) or real(model))
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
        assert proof.prove(tiny_model("llava", dtype=torch.float32)).holds
    finally:
        manager().unregister(name="listener")
    assert heard == []


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_coords_follow_from_the_config(family: str) -> None:
    """They are those of the family's file, and strategies that ask for them run."""
    model = tiny_model(family)
    inputs = tiny_batch(model, (("image",), ("image", "image")))
    pool = {"name": "pool", "stages": [{"use": "pool", "keep": 0.4}]}
    assert_equivalent(model, pool, inputs, steps=1)
    counts = [len(one) for one in encode(model, "image", inputs)]
    found = proof.proved_parts(model).modalities[0].coords(inputs, counts)
    known = FILES[family].parts(model).modalities[0].coords(inputs, counts)
    for one, expected in zip(found, known, strict=True):
        assert torch.equal(one, expected)


def test_coords_that_are_not_as_expected_are_refused() -> None:
    """A tower that turns its map around: every token is somewhere else than a square grid would have it."""
    model = Odd(odd_config("turned")).double()
    pool = {"name": "pool", "stages": [{"use": "pool", "keep": 0.25}]}
    with (
        pytest.raises(Unsupported, match="where visual tokens are in their images is not known of this model"),
        prunekit.apply(model, pool),
    ):
        model(**tiny_batch(model))


def test_videos_that_no_prompt_of_the_proof_held_are_refused() -> None:
    model = tiny_model("qwen2_vl")
    parts = proof.proved_parts(model)
    images = replace(parts, modalities=parts.modalities[:1])
    pipeline = prunekit.load(PIPELINE)
    with (
        pytest.raises(Unsupported, match="videos of this model cannot be pruned, only images"),
        Attached(model, pipeline, images),
    ):
        model(**tiny_batch(model, (("video",),)))


class Odd(LlavaForConditionalGeneration):  # type: ignore[misc]
    """A LLaVA whose decoder is not what its modules look like."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        change = {
            "scales": _scales, "tuples": _tuples, "leaves out": _leaves_out, "mixes": _mixes, "turned": _turned,
        }[config.oddity]  # fmt: skip
        change(self.model.language_model, self)


def _scales(text: Any, _: Any) -> None:
    """Its states grow after every layer, in the loop."""
    for layer in text.layers:
        layer.register_forward_pre_hook(lambda _, given: (given[0] * 1.01, *given[1:]), prepend=True)


def _tuples(text: Any, _: Any) -> None:
    for layer in text.layers:
        layer.register_forward_hook(lambda _, given, result: (result, None))


def _leaves_out(text: Any, _: Any) -> None:
    """The last layer never runs."""
    text.config.num_hidden_layers -= 1


class MixingMLP(LlamaMLP):  # type: ignore[misc]
    """Each token also takes the mean of all: what is dropped would be missed."""

    def forward(self, state: Any) -> Any:
        return super().forward(state + state.mean(1, keepdim=True))


def _mixes(text: Any, _: Any) -> None:
    text.layers[3].mlp = MixingMLP(text.config)


def _turned(_: Any, model: Any) -> None:
    model.model.multi_modal_projector.register_forward_hook(lambda _, given, result: result.flip(1))


def odd_config(oddity: str) -> Any:
    config = CONFIGS["llava"](6)
    config.oddity = oddity
    return config


@pytest.mark.parametrize(
    ("oddity", "reason"),
    [
        ("scales", "changes hidden states between all layers"),
        ("tuples", "return more than the hidden states|runs on none"),
        ("leaves out", "called 4 layers of 5"),
        ("mixes", r"is not pruned exactly: nothing pruned: logits differ from the masked reference by"),
    ],
)
def test_odd_models_are_refused(oddity: str, reason: str) -> None:
    """Subclasses of a model whose own class and config would pass: the twin is one of theirs."""
    model = Odd(odd_config(oddity))
    # A stage inside a decoder that can be cut at its input only is a fault of the pipeline.
    with pytest.raises(prunekit.PrunekitError, match=re.compile(reason, re.DOTALL)), prunekit.apply(model, PIPELINE):
        pass


@pytest.mark.parametrize("part", ["mlp", "layer"])
def test_what_was_changed_after_it_was_made_is_refused(part: str) -> None:
    """No twin made from class and config has it."""
    model = tiny_model("llava", dtype=torch.float32)
    text = model.model.language_model
    if part == "mlp":
        text.layers[3].mlp = MixingMLP(text.config)
    else:
        text.layers[3] = type("Other", (type(text.layers[3]),), {})(text.config, 3)
    with (
        pytest.raises(Unsupported, match=r"of layer 3 is a (MixingMLP|Other), which a model made from the config"),
        prunekit.apply(model, PIPELINE),
    ):
        pass


def test_adapters_inside_of_parts_are_no_change() -> None:
    """A LoRA-like layer in the place of a linear one keeps the classes of attention and MLP."""
    model = tiny_model("llava", dtype=torch.float32)
    gate = model.model.language_model.layers[1].mlp
    gate.up_proj = nn.Sequential(gate.up_proj)
    assert proof.proved_parts(model).family == "generic:llava"


@pytest.mark.parametrize("name", ["llava", "glm_ocr"])
def test_the_twin_of_real_numbers_is_small(name: str) -> None:
    """Default configs have the shapes of models of 1B and 7B; few weights and short prompts are proved in seconds."""
    config = AutoConfig.for_model(name)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    tiny = twin.twin_of(model)
    assert sum(weight.numel() for weight in tiny.model.parameters()) < 8e6
    assert tiny.inputs["input_ids"].numel() < 400
    assert proof.prove(model).holds


def _no_method(model: Any) -> None:
    model.model.get_image_features = None


def _no_id(model: Any) -> None:
    vars(model.config)["image_token_index"] = None


def _no_decoder(model: Any) -> None:
    model.get_decoder = nn.Identity


def _encoder_decoder(model: Any) -> None:
    model.config.is_encoder_decoder = True


def _crosses(model: Any) -> None:
    model.model.language_model.layers[1].cross_attn = nn.Identity()


def _no_pixels(model: Any) -> None:
    model.forward = lambda input_ids: None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_no_method, "has `get_image_features`, by which transformers encodes the images"),
        (_no_id, "its config names no `image_token_id`, the token of the prompt in whose place"),
        (_no_decoder, "its `get_decoder` gives no stack of layers"),
        (_encoder_decoder, "it is an encoder-decoder: "),
        (_crosses, "images enter its decoder by cross-attention"),
        (_no_pixels, "it takes no images"),
    ],
)
def test_what_is_missing_is_said_in_one_sentence(change: Any, reason: str) -> None:
    model = tiny_model("llava", dtype=torch.float32)
    change(model)
    with pytest.raises(Unsupported) as refusal:
        generic.recognise(model)
    said = str(refusal.value)
    assert reason in said and "docs/families.md" in said
    assert said.count("; ") == 0 and "Error" not in said


def test_a_decoder_that_is_not_plain_is_recognised() -> None:
    model = tiny_model("llava", dtype=torch.float32)
    model.model.language_model.layers[1].gate = nn.Identity()
    assert generic.recognise(model).opaque == "layer 1 has further parts: gate"


def test_a_base_model_alone_is_refused() -> None:
    with pytest.raises(Unsupported, match="it does not write text token by token"):
        generic.recognise(tiny_model("llava", dtype=torch.float32).model)
