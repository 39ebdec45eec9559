"""Rows of one batch that do different things in one layer: stand-ins for the cache that each group of rows sees.

A decoder layer hands keys and values to `cache.update(...)` and attends to what comes back. Whoever stands
in for it decides what is stored, for which rows, and what the layer attends to.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from prunekit.engine.cache.ragged import RaggedLayer
from prunekit.ops.host import on_device
from prunekit.upstream import CACHE


class Grabbed(Exception):
    """Thrown by a stand-in to leave a layer once its keys and values are computed."""


class StandIn:
    """What all of them say to a layer that asks how many tokens have passed."""

    def get_seq_length(self, *args: Any) -> int:
        """Any number would do: layers that ask are refused where it could matter (`Parts.counts_to`)."""
        return 0


@dataclass
class Grab(StandIn):
    """A cache that takes a layer's keys and values and stops it there: `grab(...)` runs a layer only that far."""

    keys: Tensor | None = None
    values: Tensor | None = None

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys, self.values = keys, values
        raise Grabbed


def grab(layer: Any, hidden: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Rotated keys and values, (B, A_kv, K, head_dim), that `layer` makes of `hidden`; attention and MLP do not run."""
    taker = Grab()
    with suppress(Grabbed):
        layer(hidden, **(kwargs | {CACHE: taker}))
    assert taker.keys is not None and taker.values is not None
    return taker.keys, taker.values


@dataclass
class Beside(StandIn):
    """A cache of one layer call, whose tokens attend to their own keys and to others that did not run.

    frozen: keys and values of the others. order: int64 (B, K), for each slot of the layer the column of its key among
    the others' and, after them, the own. through: the store that gets all of them, None without a cache.
    """

    frozen: tuple[Tensor, Tensor]
    order: Tensor
    through: Any

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        pairs = zip(self.frozen, (keys, values), strict=True)
        both = [self._all(torch.cat(pair, dim=2)) for pair in pairs]
        if self.through is None:
            return both[0], both[1]
        updated: tuple[Tensor, Tensor] = self.through.update(*both, *args, **kwargs)
        return updated

    def _all(self, x: Tensor) -> Tensor:
        index = self.order.to(x.device)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
        return x.gather(2, index)


@dataclass
class Shares:
    """Collects what several groups of rows write into one layer of a cache, and stores it when all have run.

    store: the layer. total: rows of the batch. prefill: the store is still empty.
    """

    store: RaggedLayer
    total: int
    prefill: bool
    written: list[tuple[tuple[int, ...], Tensor, Tensor]] = field(default_factory=list)

    def of(self, rows: Sequence[int]) -> _Share | RaggedLayer:
        """The cache that the group of batch rows `rows` sees: the layer itself where it stores just those."""
        return self.store if tuple(rows) == self.stored else _Share(self, tuple(rows))

    @property
    def stored(self) -> tuple[int, ...]:
        """The rows that the layer stores."""
        return tuple(range(self.total)) if self.store.rows is None else self.store.rows

    def close(self) -> None:
        """Store what was written, in the order of the stored rows; what no group wrote is zeros that nobody reads."""
        if not self.written or not self.stored:
            return
        number = {row: index for index, row in enumerate(self.stored)}
        both = []
        for part in (1, 2):
            first: Tensor = self.written[0][part]  # type: ignore[assignment]
            whole = first.new_zeros(len(self.stored), *first.shape[1:])
            for rows, *states in self.written:
                mine = [(local, number[row]) for local, row in enumerate(rows) if row in number]
                if mine:
                    taken = states[part - 1].index_select(0, _index([local for local, _ in mine], first))
                    whole = whole.index_copy(0, _index([index for _, index in mine], first), taken)
            both.append(whole)
        self.store.update(*both)


@dataclass
class _Share(StandIn):
    shares: Shares
    rows: tuple[int, ...]

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.shares.written.append((self.rows, keys, values))
        store = self.shares.store
        if self.shares.prefill or store.keys is None or store.values is None:
            return keys, values
        mine = store.stored(self.rows)
        earlier = store.keys.index_select(0, mine), store.values.index_select(0, mine)
        return torch.cat([earlier[0], keys], dim=2), torch.cat([earlier[1], values], dim=2)


def _index(rows: list[int], like: Tensor) -> Tensor:
    return on_device(rows, like.device)
