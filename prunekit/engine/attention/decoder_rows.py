"""Attention rows of decoder layers: only those that are asked for, a few queries at a time.

Shape letters: B batch, A heads, A_kv key and value heads, K keys, Q rows asked for, D numbers of a head.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from prunekit.engine.attention.attended import Attended, wide
from prunekit.errors import PluginError
from prunekit.strategy.decoder_requests import Keys, Rows, Values

# What a block of scores may take while queries are summed up.
BLOCK_BYTES = 32 * 2**20


@torch.no_grad()
def attention(states: Attended, slots: Tensor, valid: Tensor, visual: Tensor, columns: Tensor, spec: Rows) -> Tensor:
    """The rows that `spec` describes, cut to key slots `columns`, int64 (B, V): float (B, V), and with heads or queries
    kept (B, V, A), (B, V, Q) or (B, V, A, Q).

    slots, valid: int64 and bool (B, Q), the query slots asked for, and False on the padding of rows with fewer.
    visual: bool (B, K), the key slots that are visual. Raises PluginError for more heads than there are.
    """
    heads = states.query.shape[1]
    chosen = spec.heads_of(heads)
    if chosen is not None and chosen > heads:
        raise PluginError(f"Rows(heads={spec.heads}) asks for more heads than the {heads} that the model has")
    inside = _keys_of(states, slots, valid) if spec.domain == "queries" else visual
    if spec.steps > 1:
        held = _over_heads(_passed_on(states, slots, valid, inside, spec), spec.heads, None)
        return _cut(held[..., 0, :], columns)
    if spec.pooled:
        states, slots, valid = states.pooled(slots, valid), slots[:, :1] * 0, valid.any(1, keepdim=True)
    top = None if chosen is None else _top_heads(states, slots, valid, visual, inside, spec, chosen)
    parts, total = [], None
    for rows, real in _blocks(states, slots, valid, inside, spec):
        reduced = _over_heads(rows, spec.heads, top)
        real = real if reduced.ndim == 3 else real[:, None]
        if spec.over == "none":
            parts.append(_cut(reduced.masked_fill(~real[..., None], 0.0), columns))
            continue
        part = _over_queries(reduced, real[..., None], spec.over)
        total = part if total is None else torch.maximum(total, part) if spec.over == "max" else total + part
    if spec.over == "none":
        return torch.cat(parts, dim=-1)
    assert total is not None
    number = valid.sum(1).view(-1, *[1] * (total.ndim - 1))
    if spec.over == "max":
        total = total.masked_fill(number == 0, 0.0)
    elif spec.over == "mean":
        total = total / number.clamp_min(1)
    return _cut(total, columns)


def keys(states: Attended, columns: Tensor, spec: Keys | Values) -> Tensor:
    """Keys or values of the key slots `columns`, int64 (B, V): float (B, V, A_kv * D) or (B, V, A_kv, D), or their mean
    over heads (B, V, D), in at least float32.
    """
    source = states.value if isinstance(spec, Values) else states.key
    taken = source.gather(2, columns[:, None, :, None].expand(-1, source.shape[1], -1, source.shape[3]))
    if spec.heads == "mean":
        return wide(taken).mean(1)
    return taken.transpose(1, 2) if spec.heads == "none" else taken.transpose(1, 2).flatten(2)


def _blocks(
    states: Attended, slots: Tensor, valid: Tensor, inside: Tensor, spec: Rows
) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows (B, A, q, K) of a few queries at a time, and which of them are no padding, bool (B, q).

    inside: bool (B, K), the keys of the domains `visual` and `queries`.
    """
    batch, heads = states.query.shape[:2]
    step = max(BLOCK_BYTES // (batch * heads * states.key.shape[2] * 4), 1)
    for start in range(0, slots.shape[1], step):
        part = slice(start, start + step)
        yield states.scores(slots[:, part], inside, spec.domain, spec.temperature), valid[:, part]


def _keys_of(states: Attended, slots: Tensor, valid: Tensor) -> Tensor:
    """The keys of the tokens whose queries are in `slots`, int64 (B, Q), where `valid`: bool (B, K)."""
    mine = (slots + states.key.shape[2] - states.query.shape[2]).masked_fill(~valid, states.key.shape[2])
    marked = torch.zeros(len(slots), states.key.shape[2] + 1, dtype=torch.bool, device=slots.device)
    return marked.scatter_(1, mine, True)[:, :-1]


def _passed_on(states: Attended, slots: Tensor, valid: Tensor, inside: Tensor, spec: Rows) -> Tensor:
    """What every key holds after `spec.steps` steps, float (B, A, 1, K): queries begin with equal weights."""
    behind = states.key.shape[2] - states.query.shape[2]
    held: Tensor | None = None
    for _ in range(spec.steps):
        start, total = 0, None
        for rows, real in _blocks(states, slots, valid, inside, spec):
            mine = slots[:, start : start + real.shape[1]] + behind
            start += real.shape[1]
            share = valid.sum(1).clamp_min(1).to(rows).reciprocal()[:, None, None].expand(-1, rows.shape[1], 1)
            weight = share if held is None else held.gather(2, mine[:, None].expand(-1, rows.shape[1], -1))
            weighted = (rows * (weight * real[:, None])[..., None]).masked_fill(~real[:, None, :, None], 0.0).sum(2)
            total = weighted if total is None else total + weighted
        held = total
    assert held is not None
    return held[:, :, None]


def _top_heads(
    states: Attended, slots: Tensor, valid: Tensor, visual: Tensor, inside: Tensor, spec: Rows, number: int
) -> Tensor:
    """The `number` heads with the largest sums over queries and visual columns, bool (B, A)."""
    mass: Tensor | None = None
    for rows, real in _blocks(states, slots, valid, inside, spec):
        inside = rows.masked_fill(~(real[:, None, :, None] & visual[:, None, None, :]), 0.0).sum((2, 3))
        mass = inside if mass is None else mass + inside
    assert mass is not None
    order = mass.argsort(dim=1, descending=True, stable=True)[:, :number]
    return torch.zeros_like(mass, dtype=torch.bool).scatter_(1, order, True)


def _over_heads(rows: Tensor, heads: object, top: Tensor | None) -> Tensor:
    if top is not None:
        return rows.masked_fill(~top[:, :, None, None], 0.0).sum(1) / top.sum(1)[:, None, None]
    if heads == "none":
        return rows
    return rows.mean(1) if heads == "mean" else rows.amax(1) if heads == "max" else rows.sum(1)


def _over_queries(rows: Tensor, real: Tensor, over: str) -> Tensor:
    if over == "max":
        return rows.masked_fill(~real, -torch.inf).amax(-2)
    return rows.masked_fill(~real, 0.0).sum(-2)


def _cut(rows: Tensor, columns: Tensor) -> Tensor:
    index = columns.view(columns.shape[0], *[1] * (rows.ndim - 2), -1)
    return rows.gather(-1, index.expand(*rows.shape[:-1], -1)).movedim(-1, 1)
