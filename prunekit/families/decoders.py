"""The decoder of an LVLM, recognised by the names of its modules: any LVLM may carry any of these decoders.

Source of the layouts: the decoder layers of transformers (https://github.com/huggingface/transformers).
"""

from __future__ import annotations

from typing import Any

from torch import nn

from prunekit.errors import Unsupported
from prunekit.families.base import matrix_params

ATTENTION = "self_attn"
# The norms of one layer, and which of them stands between the state after attention and the MLP.
NORMS: dict[frozenset[str], str | None] = {
    frozenset({"input_layernorm"}): None,  # Cohere: attention and MLP side by side
    frozenset({"input_layernorm", "post_attention_layernorm"}): "post_attention_layernorm",
    frozenset(
        {"input_layernorm", "post_attention_layernorm", "post_self_attn_layernorm", "post_mlp_layernorm"}
    ): "post_attention_layernorm",  # GLM-4
    frozenset(
        {"input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"}
    ): "pre_feedforward_layernorm",  # Gemma 2 and 3
}
MLPS = ("mlp", "feed_forward", "block_sparse_moe")
# Kinds of attention whose KV cache can be cut.
CUTTABLE = frozenset({"full_attention", "sliding_attention"})


def decoder(text: Any) -> dict[str, Any]:
    """What `Parts` says of the decoder stack `text`: text, layers, and the names of their parts.

    Raises Unsupported for a stack that is not a plain decoder, and says what it has instead.
    """
    layers = getattr(text, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise _unknown(text, "it has no list `layers` of decoder layers")
    _check_cache(text)
    _check_layers(text, layers)
    return {
        "text": text,
        "layers": layers,
        "attention": ATTENTION,
        "mlp": _mlp(layers[0]),
        "mlp_norm": NORMS[_norms(layers[0])],
        "rotary": "rotary_emb" if hasattr(text, "rotary_emb") else None,
        "mlp_params": sum(token_params(getattr(layer, _mlp(layer)), text.config) for layer in layers) // len(layers),
    }


def token_params(module: nn.Module, config: Any) -> int:
    """As `matrix_params`, for one token: of experts, only as many as it is sent to."""
    parameters = [parameter for _, parameter in module.named_parameters()]
    experts = [parameter for parameter in parameters if parameter.ndim == 3]
    chosen = getattr(config, "num_experts_per_tok", None) if experts else 0
    if chosen is None:
        raise Unsupported(f"{type(config).__name__} has experts but does not say to how many of them a token is sent")
    return matrix_params(module) + sum(parameter[0].numel() * chosen for parameter in experts)


def _check_layers(text: Any, layers: nn.ModuleList) -> None:
    for number, layer in enumerate(layers):
        if not isinstance(getattr(layer, ATTENTION, None), nn.Module):
            parts = ", ".join(_children(layer))
            raise _unknown(text, f"layer {number} has no `{ATTENTION}`, under which attention has to be, but {parts}")
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
