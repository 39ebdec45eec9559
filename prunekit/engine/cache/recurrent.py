"""Decoder layers that hold a state instead of keys and values: linear attention, short convolutions.

Such a layer sees the tokens that enter it as a list that is really shorter: rows are right-aligned, the fillings in
front of a row are zeros to it, and zeros on an empty state leave it empty. What has passed is in the state and cannot
be taken out of it again, so cropping the KV cache leaves it as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from prunekit.engine.tokens.layout import Layout
from prunekit.errors import Unsupported
from prunekit.strategy.decisions import LayerAction
from prunekit.upstream import RECURRENT_LAYER

# Where there is none, `families.decoders` refuses the models that would need it.
_Base: Any = RECURRENT_LAYER or object
# What beside the states says how far they have come, for each of them.
_FLAGS = ("is_conv_states_initialized", "is_recurrent_states_initialized", "has_previous_state", "conv_kernel_size")


class RecurrentLayer(_Base):  # type: ignore[misc]
    """The state of one decoder layer.

    actions: what decoding does with the layer: one action, or one for each row of the batch.
    """

    # It holds no tokens, so that nothing is to be cut along when decoding runs it.
    layout: Layout | None = None
    rows: tuple[int, ...] | None = None

    def __init__(self, like: Any) -> None:
        super().__init__(number_of_states=like.number_of_states)
        self.device: Any
        self.dtype: Any
        self.conv_states: dict[int, Tensor | None]
        self.recurrent_states: dict[int, Tensor | None]
        self.record_past = like.record_past
        self.actions: LayerAction | tuple[LayerAction, ...] = LayerAction.RUN

    @property
    def is_croppable(self) -> bool:
        """Whether what has passed may be recorded and taken back; states of rows that differ are put together anew."""
        croppable: bool = super().is_croppable
        return croppable and not isinstance(self.actions, tuple)

    def begin(self, layout: Layout | None, actions: Sequence[LayerAction]) -> None:
        """Say, before a prefill runs the layer, what decoding will do with it."""
        self.actions = actions[0] if len(set(actions)) == 1 else tuple(actions)

    def open(self, tokens: int) -> None:
        """A state counts no tokens."""

    def of_rows(self, rows: Tensor) -> RecurrentLayer:
        """The states of batch rows `rows`, int64 (B',), as a layer of its own."""
        part = RecurrentLayer(self)
        part.device, part.dtype = self.device, self.dtype
        for name in _FLAGS:
            setattr(part, name, dict(getattr(self, name)))
        part.conv_states, part.recurrent_states = (
            {at: None if one is None else one.index_select(0, rows.to(one.device)) for at, one in states.items()}
            for states in (self.conv_states, self.recurrent_states)
        )
        return part

    def put(self, parts: Sequence[tuple[Tensor, RecurrentLayer]], total: int) -> None:
        """Take over the states of `parts`, each with its rows of `total`; rows of none keep theirs, or are empty."""
        first = parts[0][1]
        for name in _FLAGS:
            setattr(self, name, dict(getattr(first, name)))
        self.device, self.dtype = first.device, first.dtype
        for name in ("conv_states", "recurrent_states"):
            own = getattr(self, name)
            for at, like in getattr(first, name).items():
                if like is None:
                    continue
                whole = like.new_zeros(total, *like.shape[1:]) if own[at] is None else own[at]
                for rows, part in parts:
                    whole = whole.index_copy(0, rows.to(whole.device), getattr(part, name)[at])
                own[at] = whole

    def reset(self) -> None:
        super().reset()
        self.actions = LayerAction.RUN

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep batch rows `indices`, int64 (B',)."""
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row so many times."""
        known = [one for states in (self.conv_states, self.recurrent_states) for one in states.values()]
        total = next((len(one) for one in known if one is not None), None)
        total = len(self.actions) if isinstance(self.actions, tuple) else total
        if total is not None:
            self._select(torch.arange(total).repeat_interleave(repeats))

    def _select(self, rows: Tensor) -> None:
        if isinstance(self.actions, tuple):
            self.actions = tuple(self.actions[row] for row in rows.tolist())
        part = self.of_rows(rows)
        self.conv_states, self.recurrent_states = part.conv_states, part.recurrent_states


@dataclass
class StateShares:
    """The states that several groups of rows read and write in one layer of a cache; put together when all have run.

    cache: the layer's, with `store` at `number`. total: rows of the batch. index: makes a tensor of rows.
    """

    cache: Cache
    number: int
    store: RecurrentLayer
    total: int
    index: Callable[[Sequence[int]], Tensor]
    parts: list[tuple[Tensor, RecurrentLayer]] = field(default_factory=list)

    def of(self, rows: Sequence[int]) -> Cache:
        """The cache that the group of batch rows `rows` sees. Raises Unsupported while a cache records its past."""
        if self.store.record_past:
            raise Unsupported(
                "samples of one batch that run different layers cannot be rolled back on layers with a state; "
                "leave out prompt-lookup and assisted decoding, or give the samples one by one"
            )
        mine = self.index(rows)
        part = self.store.of_rows(mine)
        self.parts.append((mine, part))
        seen: Any = DynamicCache()
        seen.layers = [*self.cache.layers[: self.number], part, *self.cache.layers[self.number + 1 :]]
        view: Cache = seen
        return view

    def close(self) -> None:
        """Store what the groups have written."""
        if self.parts:
            self.store.put(self.parts, self.total)
