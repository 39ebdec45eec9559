"""What a `LayerAction` means for one decoder layer and a group of rows that all do it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prunekit.engine.cache.stand_ins import Beside, grab
from prunekit.engine.tokens import masks
from prunekit.engine.tokens.layout import Layout, select_rows, take
from prunekit.engine.tokens.positions import take_rotary
from prunekit.strategy.decisions import LayerAction

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from prunekit.engine.decoder.step import Step

PARTIAL = frozenset({LayerAction.SKIP_ATTENTION, LayerAction.SKIP_MLP})


@dataclass(frozen=True)
class Running:
    """One call of decoder layer `number` for one group of rows.

    original: the layer's own forward. hidden: float (B', K, H), the group's physical states. kwargs: of the layer's
    call, logical, for the whole batch. layout: of the group, None when all tokens are there. who: the group's rows, and
    rows: the same as an index, int64 (B',), None: all. cache: what the layer writes its keys to, None without one.
    """

    step: Step
    number: int
    original: Callable[..., Any]
    hidden: Tensor
    kwargs: Mapping[str, Any]
    layout: Layout | None
    who: Sequence[int]
    rows: Tensor | None
    cache: Any

    def local(self, queries: tuple[Layout, Tensor] | None = None) -> dict[str, Any]:
        """The layer's arguments for the tokens that it really runs on and attends to.

        queries: the part of `layout` that queries the rest, and its slots, int64 (B', Q); None: all of it.
        """
        local = dict(self.kwargs) | {"past_key_values": self.cache}
        if self.layout is None and self.rows is None:
            return local
        rotary = self.kwargs.get("position_embeddings")
        local["attention_mask"] = self._mask(queries)
        if rotary is not None:
            local["position_embeddings"] = self._rotary(rotary, queries)
        # Flash kernels read gaps in position_ids as packed sequences; rotation comes from position_embeddings.
        local["position_ids"] = None
        for name in self.step.session.parts.token_kwargs:
            if isinstance(given := self.kwargs.get(name), Tensor) and self.step.prefill:
                chosen = queries[0] if queries else self.layout
                given = select_rows(given, self.rows)
                local[name] = given if chosen is None else chosen.gather(given)
        return local

    def _mask(self, queries: tuple[Layout, Tensor] | None) -> Tensor | None:
        step, mask, layout = self.step, self.kwargs.get("attention_mask"), self.layout
        asking = queries[0] if queries else layout

        def make() -> Tensor | None:
            mine = mask if mask is None else select_rows(mask, self.rows)
            if layout is None or asking is None:
                return mine
            if step.prefill:
                return masks.prefill_mask(mine, asking, layout, self.hidden, step.kind)
            tail = self.kwargs["past_key_values"].layers[self.number].tail
            return masks.decode_mask(mine, layout, tail, step.tokens, self.hidden, step.kind)

        return step.once((mask, layout, asking, self.rows, "mask"), make)  # type: ignore[no-any-return]

    def _rotary(self, rotary: Any, queries: tuple[Layout, Tensor] | None) -> Any:
        step = self.step
        of = (rotary, self.layout, self.rows, "rotary")
        whole = step.once(of, lambda: step.rotations.local(rotary, self.layout, self.rows, step.prefill))
        if queries is None:
            return whole
        return tuple(take_rotary(part, queries[1]) for part in whole)


def run_action(action: LayerAction, running: Running) -> Tensor:
    """Do it: returns the group's states after the layer, float (B', K, H)."""
    if action is LayerAction.SKIP:
        return running.hidden
    if action is LayerAction.FILL_KV:
        return _fill(running)
    if action is LayerAction.FREEZE and running.step.prefill and any(running.step.session.counts):
        return _freeze(running)
    if action in PARTIAL:
        with _doing(action):
            return _call(running, running.local())
    return _call(running, running.local())


def _call(running: Running, local: dict[str, Any], hidden: Tensor | None = None) -> Tensor:
    output = running.original(running.hidden if hidden is None else hidden, **local)
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states


def _fill(running: Running) -> Tensor:
    """Write keys and values of the layer's input; nothing else runs."""
    if running.cache is not None:
        keys, values = grab(running.original, running.hidden, running.local())
        running.cache.update(keys, values, running.number)
    return running.hidden


def _freeze(running: Running) -> Tensor:
    """Visual tokens pass; the others run, and attend to them too."""
    step, rows = running.step, running.rows
    session = step.session
    layout = running.layout
    if layout is None:
        full = step.once((session, "full"), lambda: Layout.full(session.prompt.ids))
        layout = full if rows is None else full.select(rows)
    frozen = select_rows(session.visual_slots(), rows)
    present = layout.present & select_rows(session.prompt.real, rows) if running.layout is None else layout.present
    active = present & ~frozen
    many = [session.counts[row] for row in running.who]
    if not any(many):
        return _call(running, running.local())
    shared = replace(running, layout=layout)
    resting, at_rest = layout.narrow(frozen, many)
    moving, in_motion = layout.narrow(active, [session.lengths[row] - session.counts[row] for row in running.who])
    keys, values = grab(running.original, take(running.hidden, at_rest, 1), _of_part(shared, (resting, at_rest)))
    places = _places(layout.width, (at_rest, frozen), (in_motion, active))
    local = shared.local((moving, in_motion)) | {"past_key_values": Beside((keys, values), places, running.cache)}
    out = _call(running, local, take(running.hidden, in_motion, 1))
    offset = at_rest.shape[1]
    everything = torch.cat([take(running.hidden, at_rest, 1), out], dim=1)
    moved = take(everything, places.clamp_min(0), 1)
    return torch.where((places >= offset)[..., None].to(moved.device), moved, running.hidden)


def _of_part(running: Running, part: tuple[Layout, Tensor]) -> dict[str, Any]:
    """Arguments for a part of the layout that only has to make keys and values: no mask is needed."""
    local = running.local(part)
    return local | {"attention_mask": None}


def _places(width: int, *parts: tuple[Tensor, Tensor]) -> Tensor:
    """For each slot, int64 (B, K), where it stands when the parts are laid side by side; 0 for slots of no part.

    parts: slots that each part took, right-aligned, int64 (B, K_i), and which slots belong to it, bool (B, K).
    """
    offset = 0
    places = torch.zeros_like(parts[0][1], dtype=torch.int64)
    for slots, mine in parts:
        many = slots.shape[1]
        rank = mine.cumsum(1) - 1 + many - mine.sum(1, keepdim=True)
        places = torch.where(mine, rank + offset, places)
        offset += many
    return places


_DOING: ContextVar[LayerAction | None] = ContextVar("prunekit_doing", default=None)


@contextmanager
def _doing(action: LayerAction) -> Iterator[None]:
    token = _DOING.set(action)
    try:
        yield
    finally:
        _DOING.reset(token)


def left_out() -> LayerAction | None:
    """The part of the running layer that is left out, SKIP_ATTENTION or SKIP_MLP; None: neither."""
    return None if torch.compiler.is_compiling() else _DOING.get()
