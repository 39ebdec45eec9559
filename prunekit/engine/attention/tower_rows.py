"""Reading the attention of tower blocks: rows, keys, values and queries, only those that are asked for.

The blocks' attention modules ask transformers for their kernel like those of the decoder, so the same watch sees them,
under sdpa, eager and flash names alike. Packed towers attend in several calls, one for each picture or window.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.engine.tower.tokens import as_bias, visible
from prunekit.strategy.tower_requests import EncoderKeys, EncoderQueries, EncoderRows, EncoderValues

# Numbers of one piece of an attention map, when the mean over all queries needs the whole.
PIECE = 1 << 24


@dataclass(frozen=True)
class Attended:
    """What one call of an attention kernel got: queries (R, A, Q, D), keys and values (R, A, K, D), a mask or None."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scaling: float


@dataclass
class TowerWatch:
    """Hands what the watched attention modules attend to to `take`, with the number of the block."""

    blocks: Mapping[nn.Module, int]
    take: Callable[[int, Attended], None]

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, an attention kernel, with an eye on the modules."""

        @functools.wraps(function)
        def attend(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **kwargs: Any
        ) -> Any:
            if module in self.blocks:
                scaling = kwargs.get("scaling")
                scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
                mask = attention_mask if isinstance(attention_mask, Tensor) and attention_mask.ndim == 4 else None
                states = (query.detach(), key.detach(), value.detach())
                self.take(self.blocks[module], Attended(*states, mask, scaling))
            return function(module, query, key, value, attention_mask, *args, **kwargs)

        return attend


@torch.no_grad()
def read(spec: EncoderRows | EncoderKeys | EncoderValues | EncoderQueries, seen: Attended) -> Tensor:
    """What `spec` asks for, with the tokens in dimension 1: (R, K), (R, K, A), (R, K, D) or (R, K, A, D)."""
    if isinstance(spec, EncoderRows):
        row = _received(seen) if spec.query == "mean" else _cls_row(spec, seen)
        return row.mean(1) if spec.heads == "mean" else row.sum(1) if spec.heads == "sum" else _last(spec, row)
    states = seen.key if isinstance(spec, EncoderKeys) else seen.query
    if isinstance(spec, EncoderValues):
        states = seen.value
    return states.mean(1) if spec.heads == "mean" else states.transpose(1, 2)


def _last(spec: EncoderRows, row: Tensor) -> Tensor:
    return row[:, 0] if spec.heads == "joined" else row.transpose(1, 2)


def _cls_row(spec: EncoderRows, seen: Attended) -> Tensor:
    """(R, A, K), or (R, 1, K) for joined heads."""
    logits = (seen.query[:, :, :1] @ seen.key.transpose(-1, -2))[:, :, 0]
    if spec.heads == "joined":
        logits = logits.sum(1, keepdim=True) * (seen.query.shape[1] * seen.query.shape[-1]) ** -0.5
    else:
        logits = logits * seen.scaling
    if spec.domain == "logits":
        return logits
    return _softmax(logits, None if seen.mask is None else seen.mask[:, :, 0])


def _received(seen: Attended) -> Tensor:
    """The mean of each key's probability over the queries that see it, (R, A, K), in pieces; padding is no query."""
    rows, heads, length, _ = seen.query.shape
    mask = None if seen.mask is None else visible(seen.mask).expand(rows, -1, length, -1)
    real = None if mask is None else mask[:, 0].diagonal(dim1=1, dim2=2)
    total = seen.query.new_zeros(rows, heads, length, dtype=torch.promote_types(seen.query.dtype, torch.float32))
    count = total.new_zeros(rows, 1, length)
    step = max(PIECE // (rows * heads * length), 1)
    for start in range(0, length, step):
        part = slice(start, start + step)
        bias = seen.mask if seen.mask is None or seen.mask.shape[2] == 1 else seen.mask[:, :, part]
        chances = _softmax(seen.query[:, :, part] @ seen.key.transpose(-1, -2) * seen.scaling, bias)
        if mask is None or real is None:
            total, count = total + chances.sum(2), count + chances.shape[2]
        else:
            asked = real[:, None, part, None]
            total = total + (chances * asked).sum(2)
            count = count + (mask[:, :1, part] & asked).sum(2)
    return total / count.clamp_min(1)


def _softmax(logits: Tensor, mask: Tensor | None) -> Tensor:
    bias = as_bias(mask, logits)
    logits = logits if bias is None else logits + bias
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)


@torch.no_grad()
def pooled_row(head: nn.Module, states: Tensor) -> Tensor:
    """The attention (R, A, K) of a pooling head's learned query on states (R, K, W).

    head: has `probe`, (1, 1, W), and `attention`, an `nn.MultiheadAttention`.
    """
    attention: Any = head.attention
    width, heads = attention.embed_dim, attention.num_heads
    weights = attention.in_proj_weight.split(width)
    biases = (None, None) if attention.in_proj_bias is None else attention.in_proj_bias.split(width)
    probe: Any = head.probe
    query = nn.functional.linear(probe[0], weights[0], biases[0]).view(heads, -1)
    key = nn.functional.linear(states, weights[1], biases[1])
    key = key.view(*states.shape[:2], heads, -1)
    return _softmax(torch.einsum("ad,rkad->rak", query, key) * query.shape[-1] ** -0.5, None)
