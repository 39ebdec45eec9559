"""Attention rows on demand, without a full attention map.

Under sdpa a layer never forms its attention probabilities. The functions in transformers' public `AttentionInterface`
get the rotated queries and keys, so a wrapper there can compute the one row that a strategy asks for. The wrapper does
nothing
unless a tap is open in the current context for the very module that is being run. Under eager attention the module
returns its probabilities anyway, and the row is read from them.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

# Attention implementations whose masks and rows the engine understands.
SUPPORTED = ("sdpa", "eager")


@dataclass
class Tap:
    """Takes the attention row of one query per sample from one attention module.

    query: int64 (B,), the physical slot of that query. row: float (B, A, K) once the module has run, over physical
    slots.
    """

    module: nn.Module
    query: Tensor
    row: Tensor | None = None

    @torch.no_grad()
    def from_states(self, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> None:
        """Compute the row from rotated states: query (B, A, Q, D), key (B, A_kv, K, D), mask None or (B|1, 1, Q, K)."""
        rows, heads, _, dim = query.shape
        slot = self.query.to(query.device)
        chosen = query[torch.arange(rows, device=query.device), :, slot]  # (B, A, D)
        grouped = chosen.view(rows, key.shape[1], heads // key.shape[1], dim)
        logits = (grouped @ key.transpose(-1, -2)).view(rows, heads, -1) * scaling
        if mask is not None:
            line = mask.expand(rows, *mask.shape[1:])[torch.arange(rows, device=query.device), 0, slot][:, None]
            logits = logits.masked_fill(~line, -torch.inf) if line.dtype == torch.bool else logits + line
        wide = torch.promote_types(logits.dtype, torch.float32)
        self.row = logits.to(wide).softmax(-1)

    @torch.no_grad()
    def from_weights(self, weights: Tensor) -> None:
        """Read the row from probabilities (B, A, Q, K) that the module returned."""
        slot = self.query.to(weights.device)
        self.row = weights[torch.arange(weights.shape[0], device=weights.device), :, slot]

    def logical(self, index: Tensor | None, length: int) -> Tensor:
        """The row over logical positions, float (B, A, S); `index` (B, K) says where each slot stands, None: at
        itself.
        """
        if self.row is None:
            raise RuntimeError("the tapped attention module has not run")
        if index is None:
            return self.row
        place = index.to(self.row.device)[:, None].expand(-1, self.row.shape[1], -1)
        return self.row.new_zeros(*self.row.shape[:2], length).scatter_add_(2, place, self.row)


_OPEN: ContextVar[Tap | None] = ContextVar("prunekit_tap", default=None)


@contextmanager
def opened(tap: Tap) -> Iterator[Tap]:
    """Within the block, the wrapped attention functions fill `tap` when its module runs."""
    token = _OPEN.set(tap)
    try:
        yield tap
    finally:
        _OPEN.reset(token)


class _Wraps:
    """Counts who needs the wrapped attention functions; the first puts them in, the last takes them out."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users = 0
        self.originals: dict[str, Callable[..., Any]] = {}

    def acquire(self) -> None:
        with self.lock:
            self.users += 1
            if self.users == 1:
                names = [name for name in SUPPORTED if name in ALL_ATTENTION_FUNCTIONS]
                self.originals = {name: ALL_ATTENTION_FUNCTIONS[name] for name in names}
                for name, function in self.originals.items():
                    AttentionInterface.register(name, _tapped(function))

    def release(self) -> None:
        with self.lock:
            self.users -= 1
            if self.users == 0:
                for name, function in self.originals.items():
                    AttentionInterface.register(name, function)


wraps = _Wraps()


def _tapped(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, *args: Any, **kwargs: Any
    ) -> Any:
        tap = _OPEN.get()
        if tap is not None and tap.module is module:
            scaling = kwargs.get("scaling")
            tap.from_states(query, key, mask, query.shape[-1] ** -0.5 if scaling is None else scaling)
        return function(module, query, key, value, mask, *args, **kwargs)

    return attend
