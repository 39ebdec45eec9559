"""The decoder of an LVLM, recognised by the names of its modules: any LVLM may carry any of these decoders.

Source of the layouts: the decoder layers of transformers (https://github.com/huggingface/transformers).
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from prunekit import upstream
from prunekit.errors import Unsupported
from prunekit.families.weights import matrix_params, mixer_params
from prunekit.strategy.decisions import RECURRENT
from prunekit.upstream import CACHE, SHARED_KV

ATTENTION = "self_attn"
# What stands in its place in layers with a recurrent state: Qwen3.5, LFM2.
MIXERS = ("linear_attn", "conv")
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
    frozenset({"operator_norm", "ffn_norm"}): "ffn_norm",  # LFM2
    frozenset(
        {
            "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm",
            "post_per_layer_input_norm",
        }
    ): "pre_feedforward_layernorm",  # Gemma 3n and 4
}  # fmt: skip
# The norm that the decoder's output passes last; LFM2 has the second.
FINAL_NORMS = ("norm", "embedding_norm")
# Parts beside norms, attention and MLP that work on each token by itself: inputs of their own for each layer (Gemma 3n
# and 4), streams that predict and correct each other (AltUp, https://arxiv.org/abs/2301.13310), a bypass of low rank.
BY_TOKEN = frozenset({"act_fn", "per_layer_input_gate", "per_layer_projection", "altup", "laurel"})
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
# Kinds of layers whose cache can be cut, as masks say who sees whom, or that hold a state of what passed.
CUTTABLE = frozenset({"full_attention", "sliding_attention", "chunked_attention"}) | RECURRENT
# What configs call the number of times that layers run: Dory, Inkling 2.
LOOPS = ("n_recurrent_loops", "loop_num_passes")
# What configs call the number of experts that a token is sent to.
CHOSEN = ("num_experts_per_tok", "moe_topk")


class NotPlain(Unsupported):
    """A decoder that is not known inside. reason: what it has instead, as a clause."""

    def __init__(self, text: Any, reason: str) -> None:
        super().__init__(f"the decoder {type(text).__name__} is not supported: {reason}")
        self.reason = reason


def decoder(text: Any) -> dict[str, Any]:
    """What `Parts` says of the decoder stack `text`: text, layers, and the names of their parts.

    Of one that is not plain, why it can be cut at its input only. Raises Unsupported for what is no decoder stack, or
    none that can be cut at all.
    """
    try:
        return plain(text)
    except NotPlain as error:
        config = getattr(text, "config", None)
        if getattr(config, "num_hidden_layers", None) is None or getattr(config, "hidden_size", None) is None:
            raise
        return at_input_only(text, error.reason)


def _check_call(text: Any) -> None:
    """Raise Unsupported for a stack that is no decoder, or that cannot be told what a shorter prompt needs."""
    name, takes = type(text).__name__, inspect.signature(type(text).forward).parameters
    if getattr(text.config, "is_encoder_decoder", False):
        raise Unsupported(
            f"the decoder {name} is an encoder-decoder: its text attends to what an encoder made of another sequence, "
            "which no LVLM gives it"
        )
    marks = [vars(part).get(mark) for part in text.modules() for mark in ("is_causal", "is_decoder")]
    if False in marks and True not in marks:
        raise Unsupported(
            f"the decoder {name} is an encoder: its tokens see those behind them, so that it has no KV cache"
        )
    if "inputs_embeds" not in takes:
        raise Unsupported(f"the decoder {name} takes no inputs_embeds, among which features of images could stand")
    if CACHE not in takes:
        raise Unsupported(f"the decoder {name} takes no cache of transformers to decode from")
    if "position_ids" not in takes:
        raise Unsupported(
            f"the decoder {name} takes no position_ids, so that it cannot be told where the tokens that remain stand"
        )


def at_input_only(text: Any, reason: str) -> dict[str, Any]:
    """As `decoder`, of a stack inside which nothing can be cut. reason: what it has instead, as a clause.

    Raises Unsupported for one that can be cut nowhere.
    """
    _check_call(text)
    tables = sum(part.weight.numel() for part in text.modules() if isinstance(part, nn.Embedding))
    weights = token_params(text, text.config) - tables
    return {
        "text": text,
        "layers": (),
        "opaque": reason,
        "mlp_norm": None,
        "mlp_params": weights // text.config.num_hidden_layers,
        "rotary": None,
    }


def plain(text: Any) -> dict[str, Any]:
    """As `decoder`. Raises NotPlain for a stack that is not a plain decoder, and says what it has instead."""
    layers = getattr(text, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise NotPlain(text, "it has no list `layers` of decoder layers")
    if loops := [name for name in LOOPS if (getattr(text.config, name, None) or 1) > 1]:
        raise NotPlain(text, f"it runs its layers several times (`{loops[0]}`)")
    _check_cache(text)
    _check_layers(text, layers)
    mlps = tuple(token_params(getattr(layer, _mlp(layer)), text.config) for layer in layers)
    return {
        "text": text,
        "layers": layers,
        "attention": ATTENTION,
        "mixer": next((name for name in MIXERS if any(hasattr(layer, name) for layer in layers)), None),
        "mlp": _mlp(layers[0]),
        "mlp_norm": _between(layers),
        "norm": next((name for name in FINAL_NORMS if hasattr(text, name)), FINAL_NORMS[0]),
        "rotary": "rotary_emb" if hasattr(text, "rotary_emb") else None,
        "reads_positions": not hasattr(text, "rotary_emb") or any(map(_reads_positions, layers)),
        "counts_to": min((scale for layer in layers if (scale := _counts_to(layer))), default=None),
        "kv_sources": _kv_sources(text, layers),
        **_by_token(layers[0]),
        "mlp_params": sum(mlps) // len(mlps),
        "layer_mlps": mlps if len(set(mlps)) > 1 else (),
    }


def token_params(module: nn.Module, config: Any) -> int:
    """As `matrix_params`, for one token, with convolutions: of experts, only as many as it is sent to."""
    convolutions = [part.weight for part in module.modules() if isinstance(part, nn.Conv1d)]
    experts = [one for one in module.parameters() if one.ndim == 3 and not any(one is other for other in convolutions)]
    chosen = next((one for name in CHOSEN if (one := getattr(config, name, None))), None) if experts else 0
    if chosen is None:
        raise Unsupported(f"{type(config).__name__} has experts but does not say to how many of them a token is sent")
    if isinstance(chosen, (list, tuple)):  # one for each layer
        chosen = sum(chosen) // len(chosen)
    return mixer_params(module) + sum(parameter[0].numel() * chosen for parameter in experts)


def _between(layers: nn.ModuleList) -> str | None:
    """The part of a layer that gets the state after attention; None where there is none."""
    between = NORMS[_norms(layers[0])]
    return _mlp(layers[0]) if between == MLP else between


def _reads_positions(layer: nn.Module) -> bool:
    """Whether attention cannot do without position ids: queries scaled by position, as in Ministral 3."""
    attention = getattr(layer, ATTENTION, None)  # None where a recurrent part stands in its place
    taken = None if attention is None else inspect.signature(attention.forward).parameters.get("position_ids")
    return taken is not None and taken.default is inspect.Parameter.empty


def _counts_to(layer: nn.Module) -> int | None:
    """Up to which position an attention does not care that it counts positions by itself, as in Llama 4.

    It scales queries by the logarithm of their position over this number, which is 0 as long as that is below 1.
    """
    attention: Any = getattr(layer, ATTENTION, None)
    scales = getattr(attention, "attn_temperature_tuning", False) and not getattr(attention, "use_rope", True)
    return int(attention.floor_scale) if scales else None


def _check_layers(text: Any, layers: nn.ModuleList) -> None:
    for number, layer in enumerate(layers):
        mixing = [name for name in (ATTENTION, *MIXERS) if isinstance(getattr(layer, name, None), nn.Module)]
        if not mixing:
            parts = ", ".join(_children(layer))
            raise NotPlain(text, f"layer {number} has no `{ATTENTION}`, under which attention has to be, but {parts}")
        if len(mixing) > 1:
            raise NotPlain(text, f"layer {number} has {' and '.join(mixing)} at once, and so two kinds of cache")
        if indexers := [name for name in _children(getattr(layer, mixing[0])) if "indexer" in name]:
            raise NotPlain(text, f"layer {number} chooses keys by where they stand (`{ATTENTION}.{indexers[0]}`)")
        if not _mlp(layer):
            raise NotPlain(text, f"layer {number} has no MLP under a known name, but {', '.join(_children(layer))}")
        if _norms(layer) not in NORMS:
            raise NotPlain(text, f"layer {number} has an unknown order of norms: {', '.join(sorted(_norms(layer)))}")
        extra = set(_children(layer)) - _norms(layer) - {*mixing, _mlp(layer)} - BY_TOKEN
        if extra:
            raise NotPlain(text, f"layer {number} has further parts: {', '.join(sorted(extra))}")

    if not any(hasattr(layer, ATTENTION) for layer in layers):
        raise NotPlain(text, "none of its layers attends, so that there is no KV cache to cut")


def _check_cache(text: Any) -> None:
    kinds = set(getattr(text.config, "layer_types", None) or ["full_attention"])
    if kinds - CUTTABLE:
        raise NotPlain(text, f"its layers hold {', '.join(sorted(kinds - CUTTABLE))}, whose cache cannot be cut")
    if kinds & RECURRENT and upstream.RECURRENT_LAYER is None:
        raise NotPlain(text, "its layers hold recurrent states, which are cut along from transformers 5.14 on")


def _kv_sources(text: Any, layers: nn.ModuleList) -> tuple[int, ...]:
    """As `Parts.kv_sources`: readers take what the last layer of their kind before them has stored."""
    sources: list[int] = []
    stored: dict[Any, int] = {}
    for number, layer in enumerate(layers):
        attention = getattr(layer, ATTENTION, None)  # None where a recurrent part stands in its place
        kind = getattr(attention, "layer_type", None)
        reads = getattr(attention, "is_kv_shared_layer", False)
        if getattr(attention, "store_full_length_kv", False):
            stored[kind] = number
        if reads and (kind not in stored or SHARED_KV not in inspect.signature(layer.forward).parameters):
            raise NotPlain(text, f"layer {number} reads keys and values of another one in an unknown way")
        sources.append(stored[kind] if reads else number)
    shared = sources != list(range(len(layers)))
    if getattr(text.config, "num_kv_shared_layers", 0) and not shared:
        raise NotPlain(text, "its layers share their keys and values, but do not say which")
    return tuple(sources) if shared else ()


def _by_token(layer: nn.Module) -> dict[str, Any]:
    """What `Parts` says of a layer's parts beside norms, attention and MLP."""
    found: Any = {name: part for name, part in layer.named_children() if name in BY_TOKEN}
    params = sum(map(matrix_params, found.values()))
    scaled = [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]
    said: dict[str, Any] = {"mlp_last": not (found or scaled), "other_params": params}
    if "per_layer_input_gate" in found:
        said["own_inputs"] = True
    if "altup" in found:
        altup, config = found["altup"], found["altup"].config
        # Streams are predicted from each other, by coefficients that the token itself makes; the router runs twice.
        router = matrix_params(altup.modality_router)
        predicted = matrix_params(altup.prediction_coefs) + config.hidden_size * config.altup_num_inputs**2 + router
        said["stream"] = config.altup_active_idx
        said["early_params"] = predicted + matrix_params(found["laurel"])
        said["other_params"] = params + config.hidden_size * config.altup_num_inputs**2 + router
    return said


def _children(layer: nn.Module) -> list[str]:
    return [name for name, child in layer.named_children() if not isinstance(child, nn.Dropout)]


def _norms(layer: nn.Module) -> frozenset[str]:
    return frozenset(name for name in _children(layer) if "norm" in name)


def _mlp(layer: nn.Module) -> str:
    return next((name for name in MLPS if isinstance(getattr(layer, name, None), nn.Module)), "")
