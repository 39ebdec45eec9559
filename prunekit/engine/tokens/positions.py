"""Rotary positions of the tokens that remain: kept as they were, or renumbered so that no gap remains.

A decoder makes the rotations of the whole logical sequence once and hands them to every layer. Kept positions are
entries of those. Renumbered ones are made by the decoder's own rotary module from other position ids, so that every
scaling and every M-RoPE layout stays the family's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from prunekit.engine.tokens.layout import Layout, select_rows, take
from prunekit.errors import Unsupported


@dataclass(frozen=True)
class _Made:
    """One call of the rotary module and what came of it."""

    rotary: Any
    module: Callable[..., Any]
    states: Tensor
    ids: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def gave(self, rotary: Any) -> bool:
        """Whether a layer is given what this call made, or views of all of it."""
        if self.rotary is rotary or not (isinstance(rotary, tuple) and isinstance(self.rotary, tuple)):
            return self.rotary is rotary
        pairs = zip(self.rotary, rotary, strict=True)
        return all(one.data_ptr() == two.data_ptr() and one.shape == two.shape for one, two in pairs)


@dataclass
class Rotations:
    """The rotary calls of one forward pass, so that they can be made again with other positions."""

    made: list[_Made] = field(default_factory=list)

    def record(self, module: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the rotary module, `(states, position_ids, ...)`, and remember it."""
        rotary = module(*args, **kwargs)
        others = dict(kwargs)
        states = args[0] if args else others.pop("x")
        ids = args[1] if len(args) > 1 else others.pop("position_ids")
        self.made.append(_Made(rotary, module, states, ids, args[2:], others))
        return rotary

    @property
    def ids(self) -> Tensor:
        """Position ids of the complete sequence, int64 (axes, B|1, S), as the rotary module got them."""
        ids = self.made[0].ids
        return ids if ids.ndim == 3 else ids[None]

    def local(self, rotary: Any, layout: Layout | None, rows: Tensor | None, prefill: bool) -> Any:
        """The rotations, (cos, sin) or one tensor, of the slots of `layout` for batch rows `rows` (None: all)."""
        if layout is not None and layout.shift is not None:
            return self._renumbered(rotary, layout, rows, prefill)
        if rows is not None:
            rotary = each(rotary, lambda part: select_rows(part, rows, part.ndim - 3))
        if layout is None or not prefill:
            return rotary
        return each(rotary, lambda part: take_rotary(part, layout.index))

    def local_ids(self, ids: Tensor, layout: Layout | None, rows: Tensor | None, prefill: bool) -> Tensor:
        """The position ids that a layer gets, int64 (B|1, S) or (axes, B|1, S), for the same.

        They are renumbered where they are those of the rotations.
        """
        mine = select_rows(ids, rows, ids.ndim - 2)
        if layout is None:
            return mine
        if layout.shift is not None and any(made.ids is ids for made in self.made):
            return _moved(mine, layout, layout.shift, prefill)
        return _slots(mine, layout) if prefill else mine

    def shifted(self, rotary: Any, layout: Layout) -> Layout:
        """`layout` with the number of position values, int64 (B,), that none of its tokens uses any more."""
        ids = self._of(rotary).ids
        table = _used(ids, layout)
        shift = ids.amax(0).amax(-1) + 1 - table.sum(1) if ids.ndim == 3 else _last(ids, layout) + 1 - table.sum(1)
        return layout.with_shift(shift)

    def by_axis(self, rotary: Any) -> list[Any]:
        """What the call that made `rotary` would have made, in at least float32, had every axis of its position ids
        been the same one, for each axis. Raises Unsupported for rotations that no call made.
        """
        made = next((one for one in self.made if one.gave(rotary)), None)
        if made is None:
            raise Unsupported(
                "rotary is not known of this model: its layers get rotations that its rotary module did not make"
            )
        ids = made.ids if made.ids.ndim == 3 else made.ids[None]
        states = made.states.new_zeros(1, dtype=torch.promote_types(made.states.dtype, torch.float32))
        alike = [axis[None].expand_as(ids) if made.ids.ndim == 3 else axis for axis in ids]
        return [made.module(states, one, *made.args, **made.kwargs) for one in alike]

    def _renumbered(self, rotary: Any, layout: Layout, rows: Tensor | None, prefill: bool) -> Any:
        made = self._of(rotary)
        assert layout.shift is not None
        ids = _moved(select_rows(made.ids, rows, made.ids.ndim - 2), layout, layout.shift, prefill)
        states = made.states[:1]
        return made.module(states, ids, *made.args, **made.kwargs)

    def _of(self, rotary: Any) -> _Made:
        for made in self.made:
            if made.gave(rotary):
                return made
        raise Unsupported(
            "positions cannot be renumbered for this model: its layers get rotations that its rotary module did not "
            "make; use `positions: keep`"
        )


def each(rotary: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`change` of both parts of a rotation (cos, sin), or of the one complex tensor that some decoders have."""
    return change(rotary) if isinstance(rotary, Tensor) else tuple(change(part) for part in rotary)


def take_rotary(part: Tensor, index: Tensor) -> Tensor:
    """Entries of a rotation (B|1, S, D), or (axes, B|1, S, D) as M-RoPE has it, at a per-row index, int64 (B, K)."""
    return torch.stack([take(axis, index, 1) for axis in part]) if part.ndim == 4 else take(part, index, 1)


def take_ids(ids: Tensor, index: Tensor) -> Tensor:
    """Entries of position ids (B|1, S) or (axes, B|1, S) at a per-row index, int64 (B, K)."""
    return torch.stack([take(axis, index, 1) for axis in ids]) if ids.ndim == 3 else take(ids, index, 1)


def _moved(ids: Tensor, layout: Layout, shift: Tensor, prefill: bool) -> Tensor:
    """Position ids of the slots with the gaps closed, or those of new tokens behind them."""
    return _closed(ids, layout) if prefill else ids - shift[:, None].to(ids.device)


def _slots(ids: Tensor, layout: Layout) -> Tensor:
    """Position ids of the slots: (B, K), or (axes, B, K)."""
    return take_ids(ids, layout.index)


def _last(ids: Tensor, layout: Layout) -> Tensor:
    """The largest logical position of each row, int64 (B,)."""
    return ids.amax(-1).expand(len(layout.index))


def _used(ids: Tensor, layout: Layout) -> Tensor:
    """Which position values the tokens of a row still use: int64 0/1 (B, values)."""
    mine = _slots(ids, layout)
    present = layout.present.to(mine.device, torch.int64)
    table = torch.zeros(len(layout.index), int(ids.max()) + 1, dtype=torch.int64, device=mine.device)
    for axis in mine if mine.ndim == 3 else mine[None]:
        table.scatter_reduce_(1, axis, present, "amax")
    return table


def _closed(ids: Tensor, layout: Layout) -> Tensor:
    """Position ids of the slots with the gaps closed."""
    mine = _slots(ids, layout)
    rank = (_used(ids, layout).cumsum(1) - 1).clamp_min(0)
    if mine.ndim == 3:
        return torch.stack([rank.gather(1, axis) for axis in mine])
    return rank.gather(1, mine)
