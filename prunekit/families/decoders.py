"""The decoder of an LVLM, recognised by the names of its modules: any LVLM may carry any of these decoders.

Source of the layouts: the decoder layers of transformers (https://github.com/huggingface/transformers).
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from prunekit.errors import Unsupported
from prunekit.families.base import matrix_params

ATTENTION = "self_attn"
MLP = "the MLP itself"
# The norms of one layer, and which part gets the state after attention.
NORMS: dict[frozenset[str], str | None] = {
    frozenset({"input_layernorm"}): None,  # Cohere: attention and MLP side by side
    frozenset({"input_layernorm", "post_attention_layernorm"}): "post_attention_layernorm",
    frozenset({"attention_layernorm", "feedforward_layernorm"}): "feedforward_layernorm",  # Apertus
    frozenset({"input_layernorm", "pre_feedforward_layernorm"}): "pre_feedforward_layernorm",  # VaultGemma
    frozenset({"post_attention_layernorm", "post_feedforward_layernorm"}): MLP,  # OLMo 2 and 3, EXAONE 4: norms follow
    frozenset(
        {"input_layernorm", "post_attention_layernorm", "post_norm1", "post_norm2"}
    ): "post_attention_layernorm",  # HyperCLOVA X
    frozenset(
        {"input_layernorm", "post_attention_layernorm", "pre_mlp_layernorm", "post_mlp_layernorm"}
    ): "pre_mlp_layernorm",  # AFMoE
    frozenset(
        {"input_layernorm", "post_attention_layernorm", "post_self_attn_layernorm", "post_mlp_layernorm"}
    ): "post_attention_layernorm",  # GLM-4
    frozenset(
        {"input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"}
    ): "pre_feedforward_layernorm",  # Gemma 2 and 3
}
# Types of decoders that are proved as the decoder of a LLaVA; others prove themselves before they are pruned.
PROVED = frozenset({
    "afmoe", "apertus", "apertus1p5_text", "arcee", "aria_text", "axk1", "bitnet", "cohere", "cohere2",
    "cohere2_moe", "cohere_compass_text", "cwm", "deepseek_v2", "deepseek_v3", "diffllama", "doge", "dots1",
    "ernie4_5", "ernie4_5_moe", "exaone", "exaone4", "exaone_moe", "flex_olmo", "flint", "gemma", "gemma2",
    "gemma3_text", "gemma4_unified_text", "glm", "glm4", "glm4_moe", "glm4_moe_lite", "gpt_oss", "granite",
    "granite_swa", "granitemoe", "granitemoe_swa", "granitemoeshared", "helium", "hunyuan_v1_dense",
    "hunyuan_v1_moe", "hy_v3", "hyperclovax", "internlm3", "iquestcoder", "jais2", "kolibri1", "laguna", "llama",
    "llama4_text", "mellum", "mimo_v2_flash", "minicpm3", "minimax_m2", "minimax_m3_vl_text", "ministral",
    "ministral3", "mistral", "mistral4", "mixtral", "moshi", "nanochat", "nemotron", "olmo", "olmo2", "olmo3",
    "olmoe", "persimmon", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "sarvam_mla",
    "sarvam_moe", "seed_oss", "smollm3", "solar_open", "stablelm", "starcoder2", "vaultgemma", "youtu",
})  # fmt: skip
MLPS = ("mlp", "feed_forward", "block_sparse_moe")
# Kinds of attention whose KV cache can be cut: who sees whom stands in masks.
CUTTABLE = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
# What configs call the number of times that layers run: Dory, Inkling 2.
LOOPS = ("n_recurrent_loops", "loop_num_passes")
# What configs call the number of experts that a token is sent to.
CHOSEN = ("num_experts_per_tok", "moe_topk")


def decoder(text: Any) -> dict[str, Any]:
    """What `Parts` says of the decoder stack `text`: text, layers, and the names of their parts.

    Raises Unsupported for a stack that is not a plain decoder, and says what it has instead.
    """
    layers = getattr(text, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise _unknown(text, "it has no list `layers` of decoder layers")
    if loops := [name for name in LOOPS if (getattr(text.config, name, None) or 1) > 1]:
        raise _unknown(text, f"it runs its layers several times (`{loops[0]}`)")
    _check_cache(text)
    _check_layers(text, layers)
    return {
        "text": text,
        "layers": layers,
        "attention": ATTENTION,
        "mlp": _mlp(layers[0]),
        "mlp_norm": _between(layers),
        "rotary": "rotary_emb" if hasattr(text, "rotary_emb") else None,
        "reads_positions": not hasattr(text, "rotary_emb") or any(map(_reads_positions, layers)),
        "counts_to": min((scale for layer in layers if (scale := _counts_to(layer))), default=None),
        "mlp_params": sum(token_params(getattr(layer, _mlp(layer)), text.config) for layer in layers) // len(layers),
    }


def token_params(module: nn.Module, config: Any) -> int:
    """Weights of the matrix products that one token passes: of experts, only as many as a token is sent to."""
    parameters = [parameter for _, parameter in module.named_parameters()]
    experts = [parameter for parameter in parameters if parameter.ndim == 3]
    chosen = next((one for name in CHOSEN if (one := getattr(config, name, None))), None) if experts else 0
    if chosen is None:
        raise Unsupported(f"{type(config).__name__} has experts but does not say to how many of them a token is sent")
    if isinstance(chosen, (list, tuple)):  # one for each layer
        chosen = sum(chosen) // len(chosen)
    return matrix_params(module) + sum(parameter[0].numel() * chosen for parameter in experts)


def _between(layers: nn.ModuleList) -> str | None:
    """The part of a layer that gets the state after attention; None where a cut there could not be exact.

    With parameters or buffers of its own a layer may scale what goes past its MLP: no part of it gets what it adds to.
    """
    own = any(True for layer in layers for _ in (*layer.parameters(recurse=False), *layer.buffers(recurse=False)))
    between = NORMS[_norms(layers[0])]
    return None if own else _mlp(layers[0]) if between == MLP else between


def _reads_positions(layer: nn.Module) -> bool:
    """Whether attention cannot do without position ids: queries scaled by position, as in Ministral 3."""
    taken = inspect.signature(getattr(layer, ATTENTION).forward).parameters.get("position_ids")
    return taken is not None and taken.default is inspect.Parameter.empty


def _counts_to(layer: nn.Module) -> int | None:
    """Up to which position an attention does not care that it counts positions by itself, as in Llama 4.

    It scales queries by the logarithm of their position over this number, which is 0 as long as that is below 1.
    """
    attention: Any = getattr(layer, ATTENTION)
    scales = getattr(attention, "attn_temperature_tuning", False) and not getattr(attention, "use_rope", True)
    return int(attention.floor_scale) if scales else None


def _check_layers(text: Any, layers: nn.ModuleList) -> None:
    for number, layer in enumerate(layers):
        if not isinstance(getattr(layer, ATTENTION, None), nn.Module):
            parts = ", ".join(_children(layer))
            raise _unknown(text, f"layer {number} has no `{ATTENTION}`, under which attention has to be, but {parts}")
        if indexers := [name for name in _children(getattr(layer, ATTENTION)) if "indexer" in name]:
            raise _unknown(text, f"layer {number} chooses keys by where they stand (`{ATTENTION}.{indexers[0]}`)")
        if not _mlp(layer):
            raise _unknown(text, f"layer {number} has no MLP under a known name, but {', '.join(_children(layer))}")
        if _norms(layer) not in NORMS:
            raise _unknown(text, f"layer {number} has an unknown order of norms: {', '.join(sorted(_norms(layer)))}")
        extra = set(_children(layer)) - _norms(layer) - {ATTENTION, _mlp(layer)}
        if extra:
            raise _unknown(text, f"layer {number} has further parts: {', '.join(sorted(extra))}")


def _check_cache(text: Any) -> None:
    kinds = set(getattr(text.config, "layer_types", None) or ["full_attention"])
    if kinds - CUTTABLE:
        raise _unknown(text, f"its layers hold {', '.join(sorted(kinds - CUTTABLE))}, whose cache cannot be cut")
    if getattr(text.config, "num_kv_shared_layers", 0):
        raise _unknown(text, "its layers share their keys and values")


def _children(layer: nn.Module) -> list[str]:
    return [name for name, child in layer.named_children() if not isinstance(child, nn.Dropout)]


def _norms(layer: nn.Module) -> frozenset[str]:
    return frozenset(name for name in _children(layer) if "norm" in name)


def _mlp(layer: nn.Module) -> str:
    return next((name for name in MLPS if isinstance(getattr(layer, name, None), nn.Module)), "")


def _unknown(text: Any, reason: str) -> Unsupported:
    return Unsupported(f"the decoder {type(text).__name__} is not supported: {reason}")
