"""Keys and values that a decoder layer, the reader, takes from an earlier one, its source.

A decoder hands its layers one dict; sources put their keys and values into it, readers take them out. Between the two,
tokens may have left, and rows of a batch may run apart. `Handed` stands in for the dict in one call of a layer. When a
prefill is over, readers have no entries of their own in the KV cache: `seen_of` says which of their source's they see.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prunekit.engine.cache.ragged import RaggedLayer
from prunekit.engine.tokens.layout import Layout, select_rows, take

Pair = tuple[Tensor, Tensor]


@dataclass
class Handed:
    """The dict of shared keys and values, as one call of layer `number` for some rows of the batch sees it.

    whole: that dict, with keys and values (B, A_kv, K, head_dim) of all rows. writers: by its keys the layer that wrote
    last, shared by all calls of a pass. rows: int64 (B',), None: all B = `batch`. slots: int64 (B, K'), those of the
    source that the call attends to; None: all. keeps: what the layer hands on is kept; not in calls on the side.
    """

    whole: MutableMapping[Any, Pair]
    writers: dict[Any, int]
    number: int
    batch: int
    rows: Tensor | None
    slots: Tensor | None
    keeps: bool = True
    device: torch.device | None = None

    def __getitem__(self, key: Any) -> Pair:
        """Keys and values of the tokens that are alive, for the rows of the call."""
        keys, values = (self._seen(states) for states in self.whole[key])
        return keys, values

    def __setitem__(self, key: Any, pair: Pair) -> None:
        """Hand on what the rows of the call wrote; rows that write nothing have zeros, which nobody reads."""
        if not self.keeps:
            return
        if self.rows is not None:
            first = self.writers.get(key) != self.number
            before = [one.new_zeros(self.batch, *one.shape[1:]) for one in pair] if first else self.whole[key]
            parts = zip(before, pair, strict=True)
            pair = tuple(whole.index_copy(0, self.rows.to(one.device), one) for whole, one in parts)  # type: ignore[assignment]
        self.writers[key] = self.number
        self.whole[key] = pair

    def to(self, device: torch.device, non_blocking: bool = False) -> Handed:
        """What comes out from now on is on `device`: accelerate moves what it hands to layers on several."""
        self.device = device
        return self

    def _seen(self, states: Tensor) -> Tensor:
        states = states if self.slots is None else take(states, self.slots, 2)
        states = select_rows(states, self.rows)
        return states if self.device is None else states.to(self.device)


def slots_in(source: Layout | None, alive: Layout | None) -> Tensor | None:
    """The slots of `source`, int64 (B, K), that hold the tokens of `alive`, which it has all; None: all, in order."""
    if alive is None or alive is source:
        return None
    return alive.index if source is None else source.slot_of().gather(1, alive.index)


def seen_of(source: RaggedLayer, reader: RaggedLayer, alive: Layout | None, ids: Tensor) -> Layout | None:
    """Which of its source's entries in the KV cache a reader sees, for the rows whose decoding attends there.

    alive: the prompt tokens that entered the reader, of the whole batch; None: all. ids: int64 (B, S), the prompt.
    """
    rows = torch.tensor(reader.rows, dtype=torch.int64, device=ids.device) if reader.rows is not None else None
    held = source.layout
    if reader.rows != source.rows:
        local = source.stored(reader.rows if reader.rows is not None else range(len(ids))).to(ids.device)
        held = held if held is None else held.select(local)
    if alive is None:
        return held
    entered = alive if rows is None else alive.select(rows)
    held = Layout.full(ids if rows is None else ids[rows]) if held is None else held
    valid = held.present & _spread(entered, entered.present, False).gather(1, held.index)
    sizes = None if entered.sizes is None else _spread(entered, entered.sizes, 1).gather(1, held.index)
    return Layout(held.index, valid, held.length, sizes, held.shift)


def _spread(layout: Layout, slots: Tensor, other: float) -> Tensor:
    """What `slots`, (B, K), say of the tokens in them, (B, S), and `other` of all that have none."""
    whole = slots.new_full((len(layout.index), layout.length), other)
    present = layout.present
    # Fillings stand for tokens that have left, and must not say anything about them.
    return whole.scatter(1, layout.index, torch.where(present, slots, torch.full_like(slots, other)))
