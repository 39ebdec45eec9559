"""What one attention call was given, and the rows that follow from it: a few queries at a time.

Pure tensors. The numbers are those that the layer's own attention has in its softmax, whichever kernel it runs: scaled
products, soft cap, then the mask as the layer got it.

Shape letters: B batch, A heads, A_kv key and value heads, L queries of the layer, K keys, Q rows asked for, D numbers
of a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.engine.tokens.masks import visible
from prunekit.errors import Unsupported

# What undoing a decay divides by at least: the sum of cosines comes near 0 and below for far tokens, at 1,700 positions
# with 128 numbers a head and base 10,000.
LEAST_DECAY = 0.1


@dataclass(frozen=True)
class Attended:
    """What one attention call was given, detached.

    query: (B, A, L, D). key, value: (B, A_kv, K, D). mask: None, bool or additive (B|1, 1|A, L, K), or bool (B, K) of
    the keys that are no padding, as flash kernels get it. causal: whether queries see no later keys, where `mask` does
    not already say so. window: how many keys back a query sees, there too; None: all. sinks: (A,), a logit of each head
    that takes its share of the softmax and attends to nothing; None: there is none. phases: float (B|1, K, R), where
    rotation puts a vector of ones at each key, so that products of two of them are what it leaves of a product at their
    distance; None: it is not asked for.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scaling: float
    softcap: float | None = None
    causal: bool = True
    window: int | None = None
    sinks: Tensor | None = None
    phases: Tensor | None = None

    @classmethod
    def of(
        cls, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, arguments: Mapping[str, Any]
    ) -> Attended:
        """From the arguments of an attention function. Raises Unsupported for kinds whose rows are not known."""
        if mask is not None and not isinstance(mask, Tensor):
            raise Unsupported(f"attention rows and keys are not available with a {type(mask).__name__} as mask")
        if arguments.get("position_bias") is not None:
            raise Unsupported("attention rows and keys are not available where attention has a position_bias")
        scaling, causal, sinks = (arguments.get(name) for name in ("scaling", "is_causal", "s_aux"))
        return cls(
            query.detach(), key.detach(), value.detach(), None if mask is None else mask.detach(),
            query.shape[-1] ** -0.5 if scaling is None else scaling, arguments.get("softcap"),
            bool(getattr(module, "is_causal", True) if causal is None else causal), arguments.get("sliding_window"),
            None if sinks is None else sinks.detach(),
        )  # fmt: skip

    def narrowed(self, keys: int) -> Attended:
        """The same with the first keys only, if there are more."""
        if self.key.shape[2] <= keys:
            return self
        mask = self.mask if self.mask is None else self.mask[..., :keys]
        return replace(self, key=self.key[:, :, :keys], value=self.value[:, :, :keys], mask=mask)

    def logits(self, slots: Tensor) -> Tensor:
        """Scaled products of the queries in int64 (B, Q) with all keys, float (B, A, Q, K), in at least float32.

        Kernels sum up in float32 as well: in half precision products overflow, and their order is another.
        """
        batch, heads, _, dim = self.query.shape
        index = slots[:, None, :, None].expand(-1, heads, -1, dim)
        chosen, keys = wide(self.query.gather(2, index)), wide(self.key)
        grouped = chosen.reshape(batch, keys.shape[1], -1, dim)  # heads that share keys lie side by side
        products = (grouped @ keys.transpose(-1, -2)).view(batch, heads, slots.shape[1], -1) * self.scaling
        return products if self.softcap is None else torch.tanh(products / self.softcap) * self.softcap

    def seen(self, slots: Tensor) -> Tensor | None:
        """What the queries in int64 (B, Q) see: bool, or additive as the mask is, (B, 1|A, Q, K); None: everything."""
        if self.mask is not None and self.mask.ndim == 4:
            mask = self.mask.expand(slots.shape[0], -1, -1, -1)
            if mask.shape[2] == 1:  # one row for all queries
                return mask
            return mask.gather(2, slots[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
        seen = None if self.mask is None else self.mask.bool()[:, None, None, :]
        keys = torch.arange(self.key.shape[2], device=slots.device)
        behind = (slots + self.key.shape[2] - self.query.shape[2])[:, None, :, None] - keys
        if self.causal:
            seen = behind >= 0 if seen is None else seen & (behind >= 0)
        if self.window is not None:
            seen = behind < self.window if seen is None else seen & (behind < self.window)
        return seen

    def pooled(self, slots: Tensor, valid: Tensor) -> Attended:
        """The same with one query, the mean of those in int64 (B, Q) where `valid`, bool (B, Q).

        It sees what any of them sees, with what the mask adds there.
        """
        index = slots[:, None, :, None].expand(-1, self.query.shape[1], -1, self.query.shape[3])
        chosen = wide(self.query.gather(2, index)).masked_fill(~valid[:, None, :, None], 0.0)
        mean = chosen.sum(2, keepdim=True) / valid.sum(1).clamp_min(1)[:, None, None, None]
        mask, there = self.seen(slots), valid[:, None, :, None]
        if mask is not None and mask.dtype == torch.bool:
            mask = (mask & there).any(2, keepdim=True)
        elif mask is not None:
            mask = mask.masked_fill(~there, torch.finfo(mask.dtype).min).amax(2, keepdim=True)
        return replace(self, query=mean, mask=mask, causal=False, window=None)

    def scores(self, slots: Tensor, inside: Tensor | None, domain: str, temperature: float = 1.0) -> Tensor:
        """The rows of the queries in int64 (B, Q) in one of the domains of `Rows`, float (B, A, Q, K).

        inside: bool (B, K), the keys of the domains `visual` and `queries`, which alone need them. temperature: what
        logits are divided by, with what their mask adds.
        """
        logits = self.logits(slots)
        if domain == "logits":
            return logits
        rows = self._probabilities(logits, self.seen(slots), None if domain == "softmax" else inside, temperature)
        return rows if self.phases is None else rows / self._decay(slots)

    def _probabilities(self, logits: Tensor, seen: Tensor | None, keys: Tensor | None, temperature: float) -> Tensor:
        if keys is None:
            return probabilities(logits, seen, sinks=self.sinks, temperature=temperature)
        inside = keys[:, None, None, :]
        inside = inside if seen is None else inside & visible(seen)
        rows = probabilities(logits, seen, inside, temperature=temperature)
        return rows.masked_fill(~inside.any(-1, keepdim=True), 0.0)

    def _decay(self, slots: Tensor) -> Tensor:
        """What rotation leaves of products of the queries in int64 (B, Q) with all keys, float (B, 1, Q, K)."""
        assert self.phases is not None
        phases = self.phases.expand(slots.shape[0], -1, -1)
        at = (slots + self.key.shape[2] - self.query.shape[2])[..., None].expand(-1, -1, phases.shape[2])
        return (phases.gather(1, at) @ phases.transpose(-1, -2)).clamp_min(LEAST_DECAY)[:, None]


def probabilities(
    logits: Tensor,
    seen: Tensor | None,
    inside: Tensor | None = None,
    sinks: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """The softmax over the last axis of what a query sees, (B, A, Q, K), in at least float32.

    seen: bool, or additive; None: everything. inside: bool, keys beyond which the row is not normalised. sinks: (A,),
    of whose share rows sum to less than one. temperature: what all logits are divided by, with what `seen` adds.
    """
    if seen is not None:
        logits = logits.masked_fill(~seen, -torch.inf) if seen.dtype == torch.bool else logits + seen
    logits = wide(logits)
    if sinks is not None:
        column = sinks.to(logits).view(1, -1, 1, 1).expand(*logits.shape[:-1], 1)
        return (torch.cat([logits, column], dim=-1) / temperature).softmax(-1)[..., :-1]
    logits = logits if inside is None else logits.masked_fill(~inside, -torch.inf)
    return (logits if temperature == 1 else logits / temperature).softmax(-1)


def wide(x: Tensor) -> Tensor:
    """float32 in place of half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
