"""Attention rows from queries and keys: only the rows that are asked for, a few queries at a time.

Pure tensors. The numbers are those that the layer's own attention has in its softmax, whichever kernel it runs: scaled
products, soft cap, then the mask as the layer got it.

Shape letters: B batch, A heads, A_kv key and value heads, L queries of the layer, K keys, Q rows asked for, D numbers
of a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.errors import PluginError, Unsupported
from prunekit.strategy.decoder_requests import Keys, Rows, Values

# What a block of scores may take while queries are summed up.
BLOCK_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Attended:
    """What one attention call was given, detached.

    query: (B, A, L, D). key, value: (B, A_kv, K, D). mask: None, bool or additive (B|1, 1|A, L, K), or bool (B, K) of
    the keys that are no padding, as flash kernels get it. causal: whether queries see no later keys, where `mask` does
    not already say so. window: how many keys back a query sees, there too; None: all.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scaling: float
    softcap: float | None = None
    causal: bool = True
    window: int | None = None

    @classmethod
    def of(
        cls, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, arguments: Mapping[str, Any]
    ) -> Attended:
        """From the arguments of an attention function. Raises Unsupported for kinds whose rows are not known."""
        if mask is not None and not isinstance(mask, Tensor):
            raise Unsupported(f"attention rows and keys are not available with a {type(mask).__name__} as mask")
        extra = [name for name in ("s_aux", "position_bias") if arguments.get(name) is not None]
        if extra:
            raise Unsupported(f"attention rows and keys are not available where attention has {extra[0]}")
        scaling, causal = arguments.get("scaling"), arguments.get("is_causal")
        return cls(
            query.detach(), key.detach(), value.detach(), None if mask is None else mask.detach(),
            query.shape[-1] ** -0.5 if scaling is None else scaling, arguments.get("softcap"),
            bool(getattr(module, "is_causal", True) if causal is None else causal), arguments.get("sliding_window"),
        )  # fmt: skip

    def narrowed(self, keys: int) -> Attended:
        """The same with the first keys only, if there are more."""
        if self.key.shape[2] <= keys:
            return self
        mask = self.mask if self.mask is None else self.mask[..., :keys]
        return replace(self, key=self.key[:, :, :keys], value=self.value[:, :, :keys], mask=mask)

    def logits(self, slots: Tensor) -> Tensor:
        """Scaled products of the queries in int64 (B, Q) with all keys, float (B, A, Q, K)."""
        batch, heads, _, dim = self.query.shape
        index = slots[:, None, :, None].expand(-1, heads, -1, dim)
        chosen = self.query.gather(2, index)
        grouped = chosen.reshape(batch, self.key.shape[1], -1, dim)  # heads that share keys lie side by side
        products = (grouped @ self.key.transpose(-1, -2)).view(batch, heads, slots.shape[1], -1) * self.scaling
        return products if self.softcap is None else torch.tanh(products / self.softcap) * self.softcap

    def seen(self, slots: Tensor) -> Tensor | None:
        """What the queries in int64 (B, Q) see: bool, or additive as the mask is, (B, 1|A, Q, K); None: everything."""
        if self.mask is not None and self.mask.ndim == 4:
            mask = self.mask.expand(slots.shape[0], -1, -1, -1)
            return mask.gather(2, slots[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
        seen = None if self.mask is None else self.mask.bool()[:, None, None, :]
        keys = torch.arange(self.key.shape[2], device=slots.device)
        behind = (slots + self.key.shape[2] - self.query.shape[2])[:, None, :, None] - keys
        if self.causal:
            seen = behind >= 0 if seen is None else seen & (behind >= 0)
        if self.window is not None:
            seen = behind < self.window if seen is None else seen & (behind < self.window)
        return seen

    def scores(self, slots: Tensor, visual: Tensor, domain: str) -> Tensor:
        """The rows of the queries in int64 (B, Q) in one of the domains of `Rows`, float (B, A, Q, K)."""
        logits = self.logits(slots)
        wide = torch.promote_types(logits.dtype, torch.float32)
        if domain == "logits":
            return logits.to(wide)
        seen = self.seen(slots)
        if seen is not None and seen.dtype == torch.bool:
            logits = logits.masked_fill(~seen, -torch.inf)
        elif seen is not None:
            logits = logits + seen
        if domain == "softmax":
            return logits.to(wide).softmax(-1)
        there = visual[:, None, None, :]
        if seen is not None:  # an additive mask closes with the lowest number of a dtype, and may open with a bias
            there = there & (seen if seen.dtype == torch.bool else seen > max(torch.finfo(seen.dtype).min / 2, -1e30))
        rows = logits.to(wide).masked_fill(~there, -torch.inf).softmax(-1)
        return rows.masked_fill(~there.any(-1, keepdim=True), 0.0)


@torch.no_grad()
def attention(states: Attended, slots: Tensor, valid: Tensor, visual: Tensor, columns: Tensor, spec: Rows) -> Tensor:
    """The rows that `spec` describes, cut to key slots `columns`, int64 (B, V): float (B, V), and with heads or queries
    kept (B, V, A), (B, V, Q) or (B, V, A, Q).

    slots, valid: int64 and bool (B, Q), the query slots asked for, and False on the padding of rows with fewer.
    visual: bool (B, K), the key slots that are visual. Raises PluginError for more heads than there are.
    """
    heads = states.query.shape[1]
    if isinstance(spec.heads, int) and spec.heads > heads:
        raise PluginError(f"Rows(heads={spec.heads}) asks for more heads than the {heads} that the model has")
    top = _top_heads(states, slots, valid, visual, spec) if isinstance(spec.heads, int) else None
    found, total = [], None
    for rows, there in _blocks(states, slots, valid, visual, spec):
        reduced = _over_heads(rows, spec.heads, top)
        there = there if reduced.ndim == 3 else there[:, None]
        if spec.over == "none":
            found.append(_cut(reduced.masked_fill(~there[..., None], 0.0), columns))
            continue
        part = _over_queries(reduced, there[..., None], spec.over)
        total = part if total is None else torch.maximum(total, part) if spec.over == "max" else total + part
    if spec.over == "none":
        return torch.cat(found, dim=-1)
    assert total is not None
    number = valid.sum(1).view(-1, *[1] * (total.ndim - 1))
    if spec.over == "max":
        total = total.masked_fill(number == 0, 0.0)
    elif spec.over == "mean":
        total = total / number.clamp_min(1)
    return _cut(total, columns)


def keys(states: Attended, columns: Tensor, spec: Keys | Values) -> Tensor:
    """Keys or values of the key slots `columns`, int64 (B, V): float (B, V, A_kv * D), or (B, V, D) with their mean."""
    source = states.value if isinstance(spec, Values) else states.key
    taken = source.gather(2, columns[:, None, :, None].expand(-1, source.shape[1], -1, source.shape[3]))
    return taken.mean(1) if spec.heads == "mean" else taken.transpose(1, 2).flatten(2)


def _blocks(
    states: Attended, slots: Tensor, valid: Tensor, visual: Tensor, spec: Rows
) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows (B, A, q, K) of a few queries at a time, and which of them are there, bool (B, q)."""
    batch, heads = states.query.shape[:2]
    step = max(BLOCK_BYTES // (batch * heads * states.key.shape[2] * 4), 1)
    for start in range(0, slots.shape[1], step):
        part = slice(start, start + step)
        yield states.scores(slots[:, part], visual, spec.domain), valid[:, part]


def _top_heads(states: Attended, slots: Tensor, valid: Tensor, visual: Tensor, spec: Rows) -> Tensor:
    """The heads with the largest sums over queries and visual columns, bool (B, A)."""
    mass: Tensor | None = None
    for rows, there in _blocks(states, slots, valid, visual, spec):
        inside = rows.masked_fill(~(there[:, None, :, None] & visual[:, None, None, :]), 0.0).sum((2, 3))
        mass = inside if mass is None else mass + inside
    assert mass is not None and isinstance(spec.heads, int)
    order = mass.argsort(dim=1, descending=True, stable=True)[:, : spec.heads]
    return torch.zeros_like(mass, dtype=torch.bool).scatter_(1, order, True)


def _over_heads(rows: Tensor, heads: str | int, top: Tensor | None) -> Tensor:
    if top is not None:
        return rows.masked_fill(~top[:, :, None, None], 0.0).sum(1) / top.sum(1)[:, None, None]
    if heads == "none":
        return rows
    return rows.mean(1) if heads == "mean" else rows.amax(1) if heads == "max" else rows.sum(1)


def _over_queries(rows: Tensor, there: Tensor, over: str) -> Tensor:
    if over == "max":
        return rows.masked_fill(~there, -torch.inf).amax(-2)
    return rows.masked_fill(~there, 0.0).sum(-2)


def _cut(rows: Tensor, columns: Tensor) -> Tensor:
    index = columns.view(columns.shape[0], *[1] * (rows.ndim - 2), -1)
    return rows.gather(-1, index.expand(*rows.shape[:-1], -1)).movedim(-1, 1)
