"""Exact prefill FLOPs and KV bytes from token counts.

One multiply-add is two FLOPs. A decoder layer that n tokens enter costs `2 * params * n` for its matrix products and
`4 * n^2 * heads * head_dim` for the two products of attention, counted as the full square; the sum equals what
`torch.utils.flop_counter.FlopCounterMode` counts on the language model without its head. The selection itself is not in
these figures; it is in every measured time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prunekit.decisions import LayerAction, LayerPlan, ModelShape

WRITES_KV = frozenset({LayerAction.RUN, LayerAction.SKIP_MLP})


@dataclass(frozen=True)
class Cost:
    """What the prefill of a prompt batch cost, and what it would have cost dense; one entry per sample."""

    prefill_flops: tuple[int, ...]
    dense_prefill_flops: tuple[int, ...]
    kv_bytes: tuple[int, ...]
    dense_kv_bytes: tuple[int, ...]

    @property
    def flops_fraction(self) -> float:
        """Prefill FLOPs of the batch over those of the dense model."""
        return sum(self.prefill_flops) / sum(self.dense_prefill_flops)

    @property
    def kv_fraction(self) -> float:
        """KV bytes of the batch over those of the dense model."""
        return sum(self.kv_bytes) / sum(self.dense_kv_bytes)


def layer_flops(shape: ModelShape, tokens: int, action: LayerAction = LayerAction.RUN) -> int:
    """FLOPs of one decoder layer that `tokens` tokens enter at prefill."""
    attention = 2 * shape.attention_params * tokens + 4 * tokens * tokens * shape.heads * shape.head_dim
    mlp = 2 * shape.mlp_params * tokens
    has_attention = action in WRITES_KV
    has_mlp = action in (LayerAction.RUN, LayerAction.SKIP_ATTENTION)
    return attention * has_attention + mlp * has_mlp


def prefill_flops(shape: ModelShape, layer_tokens: Sequence[int], plan: LayerPlan | None = None) -> int:
    """FLOPs of the language model's prefill of one sample, whose layer l is entered by `layer_tokens[l]` tokens."""
    plan = plan or LayerPlan()
    return sum(layer_flops(shape, tokens, plan[layer]) for layer, tokens in enumerate(layer_tokens))


def kv_tokens(layer_tokens: Sequence[int], plan: LayerPlan) -> tuple[int, ...]:
    """KV entries that each layer writes at prefill of one sample."""
    return tuple(tokens if plan[layer] in WRITES_KV else 0 for layer, tokens in enumerate(layer_tokens))


def cost_of(
    shape: ModelShape,
    layer_tokens: Sequence[Sequence[int]],
    prompt_tokens: Sequence[int],
    plan: LayerPlan,
    itemsize: int,
) -> Cost:
    """The cost of a batch: per sample, the tokens that entered each layer, against its `prompt_tokens` in all layers.

    itemsize: bytes of one number in the KV cache.
    """
    width = shape.kv_width * itemsize
    return Cost(
        prefill_flops=tuple(prefill_flops(shape, row, plan) for row in layer_tokens),
        dense_prefill_flops=tuple(prefill_flops(shape, [n] * shape.layers) for n in prompt_tokens),
        kv_bytes=tuple(width * sum(kv_tokens(row, plan)) for row in layer_tokens),
        dense_kv_bytes=tuple(width * shape.layers * n for n in prompt_tokens),
    )
