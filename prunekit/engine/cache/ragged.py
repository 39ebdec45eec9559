"""Ragged per-layer KV: physical keys and values of the kept tokens, answering transformers in logical lengths.

`generate()` sizes masks and positions from the cache. A layer that stored fewer tokens, or none, must still say how
long the sequence is; so these layers count logical tokens beside the physical ones. All per-row state lives on them,
and therefore follows the cache through beam reordering, row selection and cropping.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from prunekit.engine.cache.recurrent import RecurrentLayer
from prunekit.engine.tokens.layout import Layout, take
from prunekit.errors import Unsupported
from prunekit.ops.host import on_device
from prunekit.strategy.decisions import LayerAction
from prunekit.upstream import EMPTY_LAYERS, RECURRENT_LAYER

_OWNER = "_prunekit_owner"
RUNS = (LayerAction.RUN, LayerAction.FREEZE)  # there are no visual tokens to freeze among the new ones
RUN_OR_SKIP = {*RUNS, LayerAction.SKIP}
# A sliding layer may be replaced too: all kept tokens stay, and the logical mask of transformers hides the old ones.
# Layers that read another one's keys and values have one that holds none.
ADOPTED = (DynamicLayer, DynamicSlidingWindowLayer, RECURRENT_LAYER, *EMPTY_LAYERS)


class RaggedLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """The KV of one decoder layer.

    layout: which prompt tokens it holds, for the rows that it stores; None: all of them. Of a layer that attends to
    another one's keys and values, and holds none itself, the slots of those, with the ones that it sees.
    logical: tokens that have passed the layer, kept or not. Tokens after the prompt are never dropped: they are the
    tail, in order.
    actions: what decoding does with the layer: one action, or one for each row of the batch.
    rows: the batch rows that are stored, those whose decoding reads the layer; None: all.
    runs_stored: rows differ, and decoding runs the layer for those that are stored and skips it for the others.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.layout: Layout | None = None
        self.logical = 0
        self.actions: LayerAction | tuple[LayerAction, ...] = LayerAction.RUN
        self.rows: tuple[int, ...] | None = None
        self.runs_stored = False
        self._opened = False

    def open(self, tokens: int) -> None:
        """Count `tokens` logical tokens that now pass the layer, whether or not it writes KV for them."""
        self.logical += tokens
        self._opened = True

    def begin(self, layout: Layout | None, actions: Sequence[LayerAction]) -> None:
        """Say, before a prefill runs the layer, what it will hold and what decoding will do with it."""
        kinds = set(actions)
        self.layout, self.runs_stored = layout, False
        if len(kinds) == 1:
            self.actions, self.rows = actions[0], None if actions[0].writes_kv else ()
            return
        stored = tuple(row for row, action in enumerate(actions) if action.writes_kv)
        self.actions, self.rows = tuple(actions), None if len(stored) == len(actions) else stored
        self.runs_stored = kinds <= RUN_OR_SKIP

    @property
    def tail(self) -> int:
        """Tokens after the prompt."""
        return self.logical - self.layout.length if self.layout is not None else 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append physical keys and values, (B, A_kv, K, head_dim) each; returns all of them."""
        if not self._opened:
            raise Unsupported(
                "this KV cache was pruned under prunekit.apply and is used outside of it; "
                "continue inside the same `with` block, or start with a new cache"
            )
        self._opened = False
        if self.rows == ():  # nobody will read it
            return key_states, value_states
        if self.keys is None or self.values is None:
            return super().update(key_states, value_states)
        # What a DynamicLayer does, without another Python call for every layer and step.
        self.keys = torch.cat([self.keys, key_states], dim=-2)
        self.values = torch.cat([self.values, value_states], dim=-2)
        return self.keys, self.values

    def stored(self, rows: Sequence[int]) -> Tensor:
        """Where batch rows stand among the stored ones, int64."""
        number = {row: stored for stored, row in enumerate(self.rows if self.rows is not None else range(len(self)))}
        return on_device([number[row] for row in rows], self._device)

    def __len__(self) -> int:
        return 0 if self.keys is None else self.keys.shape[0]

    @property
    def _device(self) -> torch.device | None:
        return None if self.keys is None else self.keys.device

    def narrow(self, layout: Layout, slots: Tensor) -> None:
        """Keep only `slots`, int64 (B', K), of what is stored; `layout` says which tokens they are."""
        self.layout = layout
        if self.keys is not None and self.values is not None:
            self.keys, self.values = take(self.keys, slots, 2), take(self.values, slots, 2)

    def get_seq_length(self) -> int:
        return self.logical

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.logical + query_length, 0

    def crop(self, count: int) -> None:
        """Remove the newest tokens: -`count` of them, or where `count` is positive all but the first `count`, as
        transformers before 5.15 calls it. Raises Unsupported inside a pruned prompt.
        """
        removed = max(self.logical - count, 0) if count > 0 else -count
        if self.layout is not None:
            check_crop(removed, self.tail)
        if removed and self.keys is not None and self.values is not None:
            length = self.keys.shape[2] - removed
            self.keys, self.values = self.keys[:, :, :length], self.values[:, :, :length]
        self.logical -= removed

    def reset(self) -> None:
        super().reset()
        self.layout, self.logical, self._opened = None, 0, False
        self.actions, self.rows, self.runs_stored = LayerAction.RUN, None, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if isinstance(self.actions, tuple):
            self._select(torch.arange(len(self.actions)).repeat_interleave(repeats))
        elif self.keys is not None or self.layout is not None:
            rows = len(self) or len(self.layout.index)  # type: ignore[union-attr]
            self._select(torch.arange(rows, device=self._device).repeat_interleave(repeats))

    def _select(self, rows: Tensor) -> None:
        if isinstance(self.actions, tuple):
            rows = self._select_mixed(rows)
        if self.keys is not None and self.values is not None:
            self.keys = self.keys.index_select(0, rows.to(self.keys.device))
            self.values = self.values.index_select(0, rows.to(self.values.device))
        if self.layout is not None:
            self.layout = self.layout.select(rows)

    def _select_mixed(self, rows: Tensor) -> Tensor:
        """Follow a selection of rows that differ in what decoding does; returns it in terms of stored rows."""
        wanted = _as_list(rows)
        stored = range(len(self.actions)) if self.rows is None else self.rows  # type: ignore[arg-type]
        number = {row: index for index, row in enumerate(stored)}
        self.actions = tuple(self.actions[row] for row in wanted)  # type: ignore[index]
        kept = [(new, number[old]) for new, old in enumerate(wanted) if old in number]
        self.rows = None if len(kept) == len(wanted) else tuple(new for new, _ in kept)
        # The same selection gives the same tensor, by which layers that share a layout go on sharing it.
        return _shared(rows, tuple(index for _, index in kept))


def check_crop(removed: int, tail: int) -> None:
    """Raise Unsupported when more than the `tail` tokens after a pruned prompt are to be removed."""
    if removed > tail:
        raise Unsupported("cannot crop a KV cache into its pruned prompt; crop at most the generated tokens")


def adopt(cache: Cache, layers: Sequence[Any], owner: object) -> None:
    """Put our layers into an empty cache and tie it to its owner."""
    cache.layers[:] = layers
    setattr(cache, _OWNER, owner)


def adopt_as_it_is(cache: Cache, owner: object) -> None:
    """Tie a filled cache to its owner, whatever its layers are."""
    setattr(cache, _OWNER, owner)


def takes(cache: Cache) -> bool:
    """Whether `cache` is a DynamicCache whose layers hold keys and values, or recurrent states."""
    known = (*ADOPTED, RaggedLayer, RecurrentLayer)
    return type(cache) is DynamicCache and all(type(layer) in known for layer in cache.layers)


def check(cache: Cache, taken: bool) -> None:
    """Raise Unsupported unless `cache` is empty and of a kind that is `taken`."""
    if not taken:
        kinds = sorted({type(layer).__name__ for layer in getattr(cache, "layers", ())}) or [type(cache).__name__]
        raise Unsupported(
            "pruning needs transformers' DynamicCache with layers of attention or of recurrent states, or StaticCache "
            f"with full-attention ones (none quantized or offloaded), not {type(cache).__name__} with "
            f"{', '.join(kinds)}; leave `cache_implementation` and `past_key_values` at their defaults"
        )
    if is_filled(cache):
        raise Unsupported(
            "this KV cache was filled outside of prunekit.apply; prefill inside the `with` block, with a new cache"
        )


def is_filled(cache: Cache | None) -> bool:
    """Whether tokens have passed a cache; reads nothing back from its device where its layers are ragged."""
    if not isinstance(cache, Cache):  # none, or what `check` refuses
        return False
    first = next(iter(getattr(cache, "layers", ())), None)
    return first.logical > 0 if isinstance(first, RaggedLayer) else bool(cache.get_seq_length() > 0)


def owner_of(cache: Cache | None) -> Any:
    """Who adopted this cache; None if nobody did, or if it was emptied since."""
    return getattr(cache, _OWNER, None) if is_filled(cache) else None


def _as_list(rows: Tensor) -> list[int]:
    """The host's copy of a selection, read back once for all layers."""
    listed: list[int] | None = getattr(rows, "_prunekit_rows", None)
    if listed is None:
        listed = rows.tolist()
        rows._prunekit_rows = listed  # type: ignore[attr-defined]
    return listed


def _shared(rows: Tensor, stored: tuple[int, ...]) -> Tensor:
    """`stored` on the device; the same tensor for all layers that are asked for the same `rows`."""
    made: dict[tuple[int, ...], Tensor] = rows.__dict__.setdefault("_prunekit_stored", {})
    if stored not in made:
        made[stored] = on_device(stored, rows.device)
    return made[stored]
