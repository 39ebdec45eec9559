"""What families say of their models: modules, ids, and the numbers that pipelines are costed against."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Gemma2Config

import prunekit.families
from prunekit.cost import kv_bytes
from prunekit.errors import Unsupported
from prunekit.families import families, find
from prunekit.families.decoders import decoder, plain, token_params
from prunekit.families.weights import matrix_params
from prunekit.testing.tiny_configs import CONFIGS, IMAGE, VIDEO
from prunekit.testing.tiny_families import takes_video, tiny_from_config, tiny_model, tiny_names
from prunekit.upstream import CACHE

NAMES = tiny_names()


def test_every_type_has_a_tiny_model_and_the_other_way_round() -> None:
    assert set(NAMES) == {name for family in families() for name in family.model_types}


def test_every_type_is_documented() -> None:
    table = (
        (Path(__file__).parents[2] / "docs" / "families.md").read_text(encoding="utf-8").partition("**Decoders.**")[0]
    )
    assert {
        name for row in re.findall(r"^\| [A-Z].*? \| (`.*?) \|", table, re.M) for name in re.findall(r"`(\w+)`", row)
    } == set(NAMES)


def test_every_family_file_is_short() -> None:
    for path in Path(prunekit.families.__file__).parent.glob("*.py"):
        limit = 120 if "FAMILY =" in path.read_text(encoding="utf-8") else 300
        assert len(path.read_text(encoding="utf-8").splitlines()) < limit, path


@pytest.mark.parametrize("family", NAMES)
def test_parts_are_live_modules(family: str) -> None:
    model = tiny_model(family, dtype=torch.float32)
    parts = find(model)
    modules = set(model.modules())
    assert {parts.base, parts.text, *parts.layers} <= modules
    assert parts.text is model.get_decoder() and len(parts.layers) == 6
    for number, layer in enumerate(parts.layers):
        assert {parts.mixing(number), getattr(layer, parts.mlp)} <= modules
        assert parts.mlp_norm is None or getattr(layer, parts.mlp_norm) in modules
    assert parts.final_norm in modules
    kinds = [modality.name for modality in parts.modalities]
    assert kinds == ["image", "video"] if takes_video(family) else ["image"]
    assert set(parts.visual_ids) == ({IMAGE, VIDEO} if takes_video(family) and "glm" not in family else {IMAGE})
    for modality in parts.modalities:
        assert callable(getattr(parts.base, modality.method))


# Layers of these do more behind their MLP than add it, so that they give no state that could be compared; cuts inside
# them are cells of the matrix.
MORE = ("gemma3n", "gemma4", "gemma4_unified")


@pytest.mark.parametrize("family", [name for name in NAMES if name not in MORE])
def test_the_norm_before_the_mlp_takes_the_state_after_attention(family: str) -> None:
    """State before the layer, plus what attention adds, is what enters that norm; nothing between them is missed."""
    model = tiny_model(family)
    parts = find(model)
    layer: Any = parts.layers[0]
    seen: dict[str, torch.Tensor] = {}
    norm = getattr(layer, parts.mlp_norm or "input_layernorm")
    handles = [
        norm.register_forward_pre_hook(lambda _, given: seen.__setitem__("norm", given[0])),
        layer.register_forward_pre_hook(lambda _, given: seen.__setitem__("state", given[0])),
        layer.register_forward_hook(lambda _, given, result: seen.__setitem__("out", result)),
        getattr(layer, parts.mlp).register_forward_hook(lambda _, given, result: torch.zeros_like(result)),
    ]
    model(input_ids=torch.arange(20, 30)[None], **_extra(family))
    for handle in handles:
        handle.remove()
    if parts.mlp_norm is None:
        assert torch.equal(seen["norm"], seen["state"])
    else:
        # Without its MLP the layer gives just the state that entered the norm.
        assert torch.allclose(seen["out"], seen["norm"], atol=1e-12)
        assert not torch.allclose(seen["state"], seen["norm"])


def _extra(family: str) -> dict[str, torch.Tensor]:
    types = torch.zeros(1, 10, dtype=torch.int64)
    return {"token_type_ids": types} if family in ("gemma3", "paligemma") else {}


@pytest.mark.parametrize("family", NAMES)
def test_the_shape_counts_what_one_token_costs(family: str) -> None:
    """Products of the decoder's matrices, counted while it runs on ten tokens, against the numbers of the shape."""
    model = tiny_model(family, dtype=torch.float32)
    parts, shape = find(model), find(model).shape()
    counter = FlopCounterMode(display=False)
    with counter:
        model(input_ids=torch.arange(20, 30)[None], **_extra(family))
    counts = counter.get_flop_counts()
    name = {id(module): name for name, module in model.named_modules()}
    total, attending = 0, [number for number in range(shape.layers) if number not in shape.recurrent]
    for number in attending:
        for module in (parts.mixing(number), getattr(parts.layers[number], parts.mlp)):
            found = counts[f"{type(model).__name__}.{name[id(module)]}"]
            total += sum(flops for kind, flops in found.items() if "attention" not in str(kind))
    each = [shape.of(layer) for layer in attending]
    per_token = sum(one.attention_params + one.mlp_params for one in each)
    assert total == 20 * per_token
    assert sum(one.output_params for one in each) == pytest.approx(
        sum(matrix_params(parts.mixing(layer).o_proj) for layer in attending),  # type: ignore[arg-type]
        abs=shape.layers,
    )
    with torch.no_grad():
        cache = model(input_ids=torch.arange(20, 30)[None], use_cache=True, **_extra(family))[CACHE]
    held = [
        0 if getattr(layer, "keys", None) is None else layer.keys[0, :, 0].numel() + layer.values[0, :, 0].numel()
        for layer in cache.layers
    ]
    assert held == [kv_bytes(shape, layer, 1) for layer in range(shape.layers)]


def test_experts_without_a_number_are_refused() -> None:
    module = torch.nn.Module()
    module.experts = torch.nn.Parameter(torch.zeros(4, 2, 2))
    with pytest.raises(Unsupported, match="does not say to how many"):
        token_params(module, object())


def changed(layer_change: Any) -> Any:
    model = tiny_model("llava", dtype=torch.float32)
    layer_change(model.model.language_model)
    return model.model.language_model


def _rename_attention(text: Any) -> None:
    text.layers[2].attention = text.layers[2].self_attn
    del text.layers[2].self_attn


def _other_norms(text: Any) -> None:
    text.layers[0].post_feedforward_layernorm = torch.nn.Identity()


def _further_parts(text: Any) -> None:
    text.layers[1].cross_attention = torch.nn.Identity()


def _no_layers(text: Any) -> None:
    text.layers = torch.nn.ModuleList()


def _other_kinds(text: Any) -> None:
    text.config.layer_types = ["indexed_attention", "full_attention"] * 3


def _two_at_once(text: Any) -> None:
    text.layers[2].conv = torch.nn.Identity()


def _nothing_attends(text: Any) -> None:
    for layer in text.layers:
        layer.conv = layer.self_attn
        del layer.self_attn


def _shared(text: Any) -> None:
    text.config.num_kv_shared_layers = 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_rename_attention, "layer 2 has no `self_attn`, under which attention has to be, but mlp"),
        (_other_norms, "layer 0 has an unknown order of norms: input_layernorm, post_attention_layernorm, post_"),
        (_further_parts, "layer 1 has further parts: cross_attention"),
        (_no_layers, "no list `layers`"),
        (_other_kinds, "hold indexed_attention, whose cache cannot be cut"),
        (_two_at_once, "layer 2 has self_attn and conv at once, and so two kinds of cache"),
        (_nothing_attends, "none of its layers attends"),
        (_shared, "share their keys and values"),
    ],
)
def test_a_decoder_that_is_not_plain_is_cut_at_its_input(change: Any, reason: str) -> None:
    text = changed(change)
    with pytest.raises(Unsupported, match=reason):
        plain(text)
    assert re.search(reason, decoder(text)["opaque"])


def test_another_decoder_inside_a_family() -> None:
    """Any plain decoder may stand behind a tower: LLaVA with Gemma 2."""
    config = CONFIGS["llava"](6)
    config.text_config = Gemma2Config(
        hidden_size=32, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=120,
        intermediate_size=48, query_pre_attn_scalar=16,
    )  # fmt: skip
    parts = find(tiny_from_config(config, "eager", torch.float32))
    assert parts.mlp_norm == "pre_feedforward_layernorm"
    assert parts.shape().kv_width == 64 and parts.shape().output_params == 32 * 64
