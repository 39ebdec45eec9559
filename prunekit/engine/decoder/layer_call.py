"""What a `LayerAction` means for one decoder layer: for a group of rows that all do it, and for rows that differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from prunekit.engine.attention.tap import Aborted, Record, recorded
from prunekit.engine.cache.ragged import RaggedLayer
from prunekit.engine.cache.recurrent import RecurrentLayer, StateShares
from prunekit.engine.cache.shared import Handed, slots_in
from prunekit.engine.cache.stand_ins import Beside, Shares, grab
from prunekit.engine.decoder.forward_pass import ForwardPass
from prunekit.engine.tokens import masks
from prunekit.engine.tokens.arguments import USUAL, cut_along
from prunekit.engine.tokens.layout import Layout, per_token, select_rows, take
from prunekit.engine.tokens.positions import each, take_ids, take_rotary
from prunekit.strategy.decisions import LayerAction
from prunekit.upstream import CACHE, SHARED_KV

PARTIAL = frozenset({LayerAction.SKIP_ATTENTION, LayerAction.SKIP_MLP})


@dataclass(frozen=True)
class LayerCall:
    """One call of decoder layer `number` for one group of rows.

    original: the layer's own forward. hidden: float (B', K, H), the group's physical states. kwargs: of the layer's
    call, logical, for the whole batch. layout: of the group, None for all tokens. who: the group's rows, and
    rows: the same as an index, int64 (B',), None: all. cache: what the layer writes its keys to, None without one.
    alive: in a prefill, `layout` of the whole batch with no positions moved. asking: the part of `layout` that `hidden`
    holds, and its slots, int64 (B', Q); None: all of it.
    """

    forward_pass: ForwardPass
    number: int
    original: Callable[..., Any]
    hidden: Tensor
    kwargs: Mapping[str, Any]
    layout: Layout | None
    who: Sequence[int]
    rows: Tensor | None
    cache: Any
    alive: Layout | None = None
    asking: tuple[Layout, Tensor] | None = None

    def local(self, queries: tuple[Layout, Tensor] | None = None) -> dict[str, Any]:
        """The layer's arguments for the tokens that it really runs on and attends to.

        queries: the part of `layout` that queries the rest, and its slots, int64 (B', Q); None: all of it.
        """
        return {**self.kwargs, CACHE: self.cache, **self.changes(queries)}

    def changes(self, queries: tuple[Layout, Tensor] | None = None) -> dict[str, Any]:
        """The arguments among `local` that differ from `kwargs`, but for the cache."""
        if self.layout is None and self.rows is None:
            return {}
        queries, is_prefill = queries or self.asking, self.forward_pass.is_prefill
        changes: dict[str, Any] = {"attention_mask": self._mask(queries)}
        if (ids := self.kwargs.get("position_ids")) is not None:
            changes["position_ids"] = self._position_ids(ids, queries)
        if (rotary := self.kwargs.get("position_embeddings")) is not None:
            changes["position_embeddings"] = self._rotary(rotary, queries)
        if SHARED_KV in self.kwargs and (is_prefill or self.rows is not None):
            changes[SHARED_KV] = self.handed()
        return changes | self._others(queries)

    @property
    def has_more(self) -> bool:
        """Whether the layer is given more that may differ from row to row than what all decoders give."""
        return SHARED_KV in self.kwargs or any(
            isinstance(value, (Tensor, dict, list, tuple))
            for name, value in self.kwargs.items()
            if name not in USUAL
        )

    def _others(self, queries: tuple[Layout, Tensor] | None) -> dict[str, Any]:
        """The arguments that only some decoders have, and that differ."""
        current = self.forward_pass
        slots = (queries[0] if queries else self._tokens()) if current.is_prefill else None
        if slots is None and self.rows is None:
            return {}
        size = len(current.state.lengths), current.tokens
        others = {name: value for name, value in self.kwargs.items() if name not in USUAL and value is not None}
        return {name: cut_along(name, value, size, self.rows, slots) for name, value in others.items()}

    def _position_ids(self, ids: Tensor, queries: tuple[Layout, Tensor] | None) -> Tensor | None:
        current, layout = self.forward_pass, self.layout
        if not current.gives_positions:
            return None
        of = (ids, layout, self.rows, "positions")
        whole = current.once(of, lambda: current.rotations.local_ids(ids, layout, self.rows, current.is_prefill))
        return whole if queries is None else take_ids(whole, queries[1])

    def _tokens(self) -> Layout | None:
        """The tokens that `hidden` holds, also where they attend to nothing; None: all that the call was given."""
        if self.layout is not None or self.alive is None or self.rows is None:
            return self.layout if self.forward_pass.is_prefill else None
        return self.alive.select(self.rows)

    def handed(self, keeps: bool = True) -> Handed:
        """The keys and values that layers share, as this call sees them; keeps: as in `Handed`."""
        current = self.forward_pass
        slots = None
        if self.reads and current.is_prefill:
            source = current.layouts[self.source]
            slots = current.once((source, self.alive, "slots"), lambda: slots_in(source, self.alive))
        batch = len(current.state.lengths)
        return Handed(self.kwargs[SHARED_KV], current.writers, self.number, batch, self.rows, slots, keeps)

    @property
    def reads(self) -> bool:
        """Whether the layer attends to keys and values of an earlier one, and writes none."""
        return self.forward_pass.state.parts.is_reader(self.number)

    @property
    def source(self) -> int:
        """That earlier layer, or the layer itself."""
        return self.forward_pass.state.bound.shape.kv_source(self.number)

    def _mask(self, queries: tuple[Layout, Tensor] | None) -> Tensor | None:
        current, mask, layout = self.forward_pass, self.kwargs.get("attention_mask"), self.layout
        asking = queries[0] if queries else layout
        # Layers with a recurrent state take the padding alone, as flash kernels do.
        kind = current.kind if current.state.parts.attends(self.number) else "flat"

        def make() -> Tensor | None:
            mine = mask if mask is None else select_rows(mask, self.rows)
            if layout is None or asking is None:
                return mine
            if current.is_prefill:
                return masks.prefill_mask(mine, asking, layout, self.hidden, kind)
            tail = self.kwargs[CACHE].layers[self.number].tail
            return masks.decode_mask(mine, layout, tail, current.tokens, self.hidden, current.kind)

        return current.once((mask, layout, asking, self.rows, kind), make)  # type: ignore[no-any-return]

    def _rotary(self, rotary: Any, queries: tuple[Layout, Tensor] | None) -> Any:
        current = self.forward_pass
        of: tuple[object, ...] = (rotary, self.layout, self.rows, "rotary")
        if self.reads and current.is_prefill and self.layout is not None and self.layout.shift is not None:
            of = (*of, current.layouts[self.source])
            whole = current.once(of, lambda: self._rotary_of_source(rotary))
        else:
            whole = current.once(
                of, lambda: current.rotations.local(rotary, self.layout, self.rows, current.is_prefill)
            )
        if queries is None:
            return whole
        return each(whole, lambda part: take_rotary(part, queries[1]))

    def _rotary_of_source(self, rotary: Any) -> Any:
        """Renumbered positions are those that the keys have, which are the source's."""
        current = self.forward_pass
        source = current.localised(current.layouts[self.source], self.kwargs)
        source = source if source is None or self.rows is None else source.select(self.rows)
        whole = current.rotations.local(rotary, source, self.rows, True)
        slots = slots_in(source, self.layout)
        return whole if slots is None else tuple(take_rotary(part, slots) for part in whole)


def run_action(action: LayerAction, call: LayerCall) -> Tensor:
    """Do it: returns the group's states after the layer, float (B', K, H)."""
    if action is LayerAction.SKIP:
        return call.hidden
    if action is LayerAction.FILL_KV:
        return _fill(call)
    if action is LayerAction.FREEZE and call.forward_pass.is_prefill and call.forward_pass.state.has_visual:
        return _freeze(call)
    if action in PARTIAL:
        return _run_part(call, action)
    return _run(call, call.local())


def run_groups(call: LayerCall, actions: Sequence[LayerAction], store: RaggedLayer | RecurrentLayer | None) -> Tensor:
    """Rows that do the same run together; rows that skip cost nothing. Returns all rows' states, float (B, K, H).

    call: of the whole batch. actions: one for each row. store: the layer's KV or state; None without a cache.
    """
    state, results = call.forward_pass.state, call.hidden
    shares: Shares | StateShares | None = None
    if isinstance(store, RaggedLayer):
        shares = Shares(store, len(actions), call.forward_pass.is_prefill)
    elif store is not None:
        shares = StateShares(call.cache, call.number, store, len(actions), state.index)
    for action in dict.fromkeys(actions):
        if action is LayerAction.SKIP:
            continue
        who = [row for row, one in enumerate(actions) if one is action]
        rows = state.index(who)
        layout = _layout_of(call, who, store) if action.writes_kv else None
        cache = None if shares is None else shares.of(who)
        asking = call.asking and (call.asking[0].select(rows), select_rows(call.asking[1], rows))
        part = replace(
            call, hidden=select_rows(call.hidden, rows), layout=layout, who=who, rows=rows, cache=cache, asking=asking
        )
        results = results.index_copy(0, rows.to(results.device), run_action(action, part))
    if shares is not None:
        shares.close()
    return results


def _layout_of(call: LayerCall, who: list[int], store: RaggedLayer | RecurrentLayer | None) -> Layout | None:
    """The part of the layout that belongs to the rows `who`; in decoding a layout has the stored rows alone."""
    if call.layout is None:
        return None
    if not call.forward_pass.is_prefill and store is not None and store.rows is not None:
        who = [store.rows.index(row) for row in who]
    return call.layout.select(call.forward_pass.state.index(who))


def _run_part(call: LayerCall, action: LayerAction) -> Tensor:
    """Run the layer without its attention or without its MLP; the overrides of those look at `left_out`."""
    call.forward_pass.left_out = action
    try:
        return _run(call, call.local())
    finally:
        call.forward_pass.left_out = None


def _run(call: LayerCall, local: dict[str, Any], hidden: Tensor | None = None) -> Tensor:
    output = call.original(call.hidden if hidden is None else hidden, **local)
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states


def _fill(call: LayerCall) -> Tensor:
    """Write keys and values of the layer's input; nothing else runs. A layer that reads another one's has none."""
    parts = call.forward_pass.state.parts
    if call.reads:
        return call.hidden
    if parts.is_source(call.number):  # until its kernel is asked for, it has written them and handed them on
        with suppress(Aborted), recorded(Record(getattr(parts.layers[call.number], parts.attention), abort=True)):
            _run(call, call.local())
    elif call.cache is not None:
        keys, values = grab(call.original, call.hidden, call.local())
        call.cache.update(keys, values, call.number)
    return call.hidden


def _freeze(call: LayerCall) -> Tensor:
    """Visual tokens pass; the others run, and attend to them too."""
    current, rows, state = call.forward_pass, call.rows, call.forward_pass.state
    layout = call.layout
    if layout is None:
        full = current.once((state, "full"), state.full_layout)
        layout = full if rows is None else full.select(rows)
    frozen = select_rows(state.visual_slots(), rows)
    present = layout.present & select_rows(state.prompt.real, rows) if call.layout is None else layout.present
    active = present & ~frozen
    many = [state.counts[row] for row in call.who]
    if not any(many):
        return _run(call, call.local())
    shared = replace(call, layout=layout)
    resting, at_rest = layout.narrow(frozen, many)
    moving, in_motion = layout.narrow(active, [state.lengths[row] - state.counts[row] for row in call.who])
    order = _side_by_side(layout.width, (at_rest, frozen), (in_motion, active))
    local = shared.local((moving, in_motion))
    if not call.reads:
        both = grab(call.original, take(call.hidden, at_rest, 1), _of_part(shared, (resting, at_rest)))
        local |= {CACHE: Beside(both, order, call.cache)}
    out = _run(call, local, take(call.hidden, in_motion, 1))
    offset = at_rest.shape[1]
    everything = torch.cat([take(call.hidden, at_rest, 1), out], dim=1)
    moved = take(everything, order.clamp_min(0), 1)
    return torch.where(per_token(order >= offset, moved).to(moved.device), moved, call.hidden)


def _of_part(call: LayerCall, part: tuple[Layout, Tensor]) -> dict[str, Any]:
    """Arguments for a part of the layout that only has to make keys and values: no mask is needed."""
    local = call.local(part)
    return local | {"attention_mask": None}


def _side_by_side(width: int, *parts: tuple[Tensor, Tensor]) -> Tensor:
    """For each slot, int64 (B, K), its column when the parts are laid side by side; 0 for slots of no part.

    parts: slots that each part took, right-aligned, int64 (B, K_i), and which slots belong to it, bool (B, K).
    """
    offset = 0
    order = torch.zeros_like(parts[0][1], dtype=torch.int64)
    for slots, mine in parts:
        many = slots.shape[1]
        rank = mine.cumsum(1) - 1 + many - mine.sum(1, keepdim=True)
        order = torch.where(mine, rank + offset, order)
        offset += many
    return order
