"""Reading the attention of tower blocks: rows, keys, values and queries, only those that are asked for.

Packed towers attend in several calls, one for each image or window; each is read by itself.

Shape letters: R rows of the tower's batch, A heads, K keys (and queries), D numbers of a head, W width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from prunekit.engine.attention.attended import Attended, probabilities, wide
from prunekit.engine.tokens.masks import visible
from prunekit.strategy.tower_requests import EncoderKeys, EncoderQueries, EncoderRows, EncoderValues

# Numbers of one piece of an attention map, when the mean over all queries needs the whole.
PIECE = 1 << 24


@torch.no_grad()
def read(spec: EncoderRows | EncoderKeys | EncoderValues | EncoderQueries, attended: Attended) -> Tensor:
    """What `spec` asks for, with the tokens in dimension 1: (R, K), (R, K, A), (R, K, D) or (R, K, A, D)."""
    if isinstance(spec, EncoderRows):
        row = _received(attended) if spec.query == "mean" else _cls_row(spec, attended)
        return heads_together(row, spec.heads)
    states = attended.key if isinstance(spec, EncoderKeys) else attended.query
    states = attended.value if isinstance(spec, EncoderValues) else states
    return wide(states).mean(1) if spec.heads == "mean" else states.transpose(1, 2)


def heads_together(row: Tensor, heads: str) -> Tensor:
    """(R, A, K) as `EncoderRows.heads` says: (R, K), or (R, K, A)."""
    if heads == "none":
        return row.transpose(1, 2)
    return row.mean(1) if heads == "mean" else row.sum(1)


def _cls_row(spec: EncoderRows, attended: Attended) -> Tensor:
    """(R, A, K), or (R, 1, K) for joined heads."""
    query = attended.query
    first = torch.zeros(len(query), 1, dtype=torch.int64, device=query.device)
    if spec.heads != "joined":
        return attended.scores(first, None, spec.domain)[:, :, 0]
    logits = (wide(query[:, :, :1]) @ wide(attended.key).transpose(-1, -2)).sum(1, keepdim=True)
    logits = logits * (query.shape[1] * query.shape[-1]) ** -0.5
    return (logits if spec.domain == "logits" else probabilities(logits, attended.seen(first)))[:, :, 0]


def _received(attended: Attended) -> Tensor:
    """The mean of each key's probability over the queries that see it, (R, A, K), in pieces; padding is no query."""
    rows, heads, length, _ = attended.query.shape
    slots = torch.arange(length, device=attended.query.device).expand(rows, length)
    total: Tensor | float = 0.0
    count: Tensor | float = 0.0
    for part in torch.split(slots, max(PIECE // (rows * heads * length), 1), dim=1):
        chances, seen = attended.scores(part, None, "softmax"), attended.seen(part)
        if seen is None:
            total, count = total + chances.sum(2), count + part.shape[1]
            continue
        sees = visible(seen)[:, :1].expand(-1, -1, part.shape[1], -1)
        real = sees.gather(3, part[:, None, :, None])  # a token that does not see itself is padding
        total = total + (chances * real).sum(2)
        count = count + (sees & real).sum(2)
    return torch.as_tensor(total / (count.clamp_min(1) if isinstance(count, Tensor) else count))


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
    return probabilities(torch.einsum("ad,rkad->rak", wide(query), wide(key)) * query.shape[-1] ** -0.5, None)
