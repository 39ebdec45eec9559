"""What a run's report says about every token in every layer, as plain tables for the masked reference.

Shape letters: B batch, P padded prompt, S prompt plus decoded tokens, N layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prunekit.strategy.decisions import LayerAction, LayerPlan
from prunekit.strategy.sites import Site

if TYPE_CHECKING:
    from prunekit.records import RunReport, StageEvent

# What becomes of a token in a layer whose row has this action: it takes the layer's result, adds attention, adds MLP.
RUNS = {action: action not in (LayerAction.SKIP, LayerAction.FILL_KV) for action in LayerAction}
ATTENDS = {action: action is not LayerAction.SKIP_ATTENTION for action in LayerAction}
MLPS = {action: action is not LayerAction.SKIP_MLP for action in LayerAction}


@dataclass(frozen=True)
class Move:
    """One event at the point where its tokens move: slots of the prompt, int64, per row.

    entered, kept: slots of visual tokens before and after. number: of the event in the report.
    """

    number: int
    entered: tuple[Tensor, ...]
    kept: tuple[Tensor, ...]


@dataclass
class TokenTables:
    """Tables of one run.

    entering[l]: bool (B, P), prompt tokens that enter layer l, which its prompt queries can see.
    lasting[l]: bool (B, P), prompt tokens whose keys and values decoded tokens find in layer l.
    sizes[l]: float64 (B, P), tokens that each key of layer l stands for.
    before[l], mid[l], after[l]: what moves before layer l, inside it between attention and MLP, and right behind it,
    before a decoder adds anything there.
    plans: per row. sources: for each layer the one whose keys and values it attends to. last_only: as in the report.
    recurrent: layers that hold a state in place of keys and values.
    """

    prompt: Tensor
    visual: Sequence[Tensor]
    plans: Sequence[LayerPlan]
    entering: list[Tensor]
    lasting: list[Tensor]
    sizes: list[Tensor]
    before: list[list[Move]]
    mid: list[list[Move]]
    after: list[list[Move]]
    sources: Sequence[int]
    last_only: tuple[int, int] | None
    recurrent: frozenset[int]

    def switch(self, layer: int, table: dict[LayerAction, bool], tokens: int, frozen: bool = False) -> Tensor:
        """Bool (B, S): which tokens do in `layer` what `table` says of their row's action in their phase.

        frozen: also leave out visual tokens where the action is FREEZE.
        """
        length = self.prompt.shape[1]
        does = torch.ones(len(self.plans), tokens, dtype=torch.bool, device=self.prompt.device)
        for row, plan in enumerate(self.plans):
            does[row, :length] = table[plan[layer]]
            does[row, length:] = table[plan.decoding(layer)]
            if frozen and plan[layer] is LayerAction.FREEZE:
                does[row, self.visual[row]] = False
        return does

    def kv_tokens(self) -> tuple[tuple[int, ...], ...]:
        """Per row and layer, how many prompt tokens decoding finds in the KV cache: none of another layer's own."""
        own = [layer == source and layer not in self.recurrent for layer, source in enumerate(self.sources)]
        return tuple(
            tuple(int(table[row].sum()) * mine for table, mine in zip(self.lasting, own, strict=True))
            for row in range(len(self.plans))
        )

    def listed(self, layer: int, row: int, tokens: int) -> Tensor:
        """The list of tokens that a layer with a recurrent state runs on: int64, prompt tokens and decoded ones."""
        plan, length = self.plans[row], self.prompt.shape[1]
        there = torch.zeros(tokens, dtype=torch.bool, device=self.prompt.device)
        there[:length] = self.entering[layer][row] & plan[layer].attends
        there[length:] = plan.decoding(layer).attends
        return there.nonzero()[:, 0]

    def layer_tokens(self) -> tuple[tuple[int, ...], ...]:
        """Per row and layer, how many prompt tokens enter."""
        layers = range(len(self.entering))
        return tuple(tuple(int(self._running(layer)[row].sum()) for layer in layers) for row in range(len(self.plans)))

    def _running(self, layer: int) -> Tensor:
        """Which prompt tokens enter a layer, bool (B, P): where no more is wanted, only the last of those alive."""
        entering = self.entering[layer]
        if self.last_only is None or layer < self.last_only[0]:
            return entering
        behind = entering.flip(1).cumsum(1).flip(1)
        return entering & (behind <= self.last_only[1])

    def mlp_tokens(self) -> tuple[tuple[int, ...], ...]:
        """Per row and layer, how many prompt tokens pass the MLP: not those that a cut inside the layer drops."""
        rows = []
        for row in range(len(self.plans)):
            counts = []
            for layer in range(len(self.entering)):
                passing = self._running(layer)[row].clone()
                for move in self.mid[layer]:
                    passing[move.entered[row]] = False
                    passing[move.kept[row]] = True
                length = len(passing)
                passing &= self.switch(layer, RUNS, length, frozen=True)[row] & self.switch(layer, MLPS, length)[row]
                counts.append(int(passing.sum()))
            rows.append(tuple(counts))
        return tuple(rows)


def tables_of(
    prompt: Tensor,
    present: Tensor,
    visual: Sequence[Tensor],
    report: RunReport,
    sources: Sequence[int],
    recurrent: frozenset[int] = frozenset(),
) -> TokenTables:
    """Follow the events of `report` through the layers, of which `recurrent` hold a state.

    prompt: int64 (B, P). present: bool (B, P), False on padding. visual: slots of the visual tokens of each row, int64.
    sources: for each layer the one whose keys and values it attends to.
    Raises ValueError when the report contradicts itself or the prompt.
    """
    check(report, visual)
    plans = tuple(report.plans)
    moves = moves_of(report, visual)
    alive, size = present.clone(), torch.ones(prompt.shape, dtype=torch.float64, device=prompt.device)
    tables = TokenTables(prompt, visual, plans, [], [], [], [], [], [], sources, report.last_only, recurrent)
    for layer, source in enumerate(sources):
        before = [(site, move) for site, move in moves if _moves_before(site, layer)]
        for _, move in before:
            _apply(move, report.events[move.number], alive, size)
        mid, after = (
            [move for site, move in moves if site == Site(layer, "layer", point)] for point in ("mid", "after")
        )
        tables.before.append([move for site, move in before if site.point != "after"])
        tables.mid.append(mid)
        tables.after.append(after)
        tables.entering.append(alive.clone())
        tables.sizes.append(size.clone())
        # A layer whose keys no decoding step will ask for need not hold them.
        written = [plan[source].writes_kv and plan.decoding(layer).attends for plan in plans]
        tables.lasting.append(alive & torch.tensor(written, device=alive.device)[:, None])
        for move in mid:
            _apply(move, report.events[move.number], alive, size)
    for site, move in moves:
        if site.place == "prefill_end" or report.events[move.number].crop:
            for table in tables.lasting:
                for row, (entered, kept) in enumerate(zip(move.entered, move.kept, strict=True)):
                    gone = entered[~torch.isin(entered, kept)]
                    table[row, gone] = False
    return tables


def check(report: RunReport, visual: Sequence[Tensor]) -> None:
    """Raises ValueError when the report contradicts itself or the prompt's visual tokens."""
    counts = tuple(map(len, visual))
    if report.samples != len(counts) or report.visual_tokens != counts:
        raise ValueError(f"the report has visual tokens {report.visual_tokens}, the inputs have {counts}")
    everything = tuple(tuple(range(count)) for count in counts)
    decided = [everything, *(event.kept for event in report.events)]
    for event, (before, after) in zip(report.events, pairwise(decided), strict=True):
        if event.entered != tuple(map(len, before)):
            raise ValueError(f"{event.stage} at {event.site}: {event.entered} entered, {before} had been kept")
        for old, new in zip(before, after, strict=True):
            if not set(new) <= set(old) or list(new) != sorted(set(new)):
                raise ValueError(f"{event.stage} at {event.site}: kept {new} of {old}")
    if report.kept_tokens != tuple(map(len, decided[-1])):
        raise ValueError(f"the report keeps {report.kept_tokens}, its last event {decided[-1]}")
    if len(report.plans) != len(counts):
        raise ValueError(f"the report has {len(report.plans)} plans for {len(counts)} samples")


def _moves_before(site: Site, layer: int) -> bool:
    if site.place == "prefill_end" or (site.in_decoder and site.point == "mid"):
        return False
    return max(site.depth, 0) == layer


def moves_of(report: RunReport, visual: Sequence[Tensor]) -> list[tuple[Site, Move]]:
    """What moves at each event of a report, in the order of the data. visual: as for `tables_of`."""
    remaining = [list(range(len(slots))) for slots in visual]
    moves = []
    for number, event in enumerate(report.events):
        entered = tuple(
            slots[torch.tensor(old, dtype=torch.long)] for slots, old in zip(visual, remaining, strict=True)
        )
        remaining = [list(row) for row in event.kept]
        kept = tuple(slots[torch.tensor(new, dtype=torch.long)] for slots, new in zip(visual, remaining, strict=True))
        moves.append((Site.parse(event.site), Move(number, entered, kept)))
    return moves


def _apply(move: Move, event: StageEvent, alive: Tensor, size: Tensor) -> None:
    for row, (entered, kept) in enumerate(zip(move.entered, move.kept, strict=True)):
        alive[row, entered] = False
        alive[row, kept] = True
        if event.sizes is not None and not Site.parse(event.site).in_tower:  # sizes of a tower end with it
            size[row, kept] = torch.tensor(event.sizes[row], dtype=size.dtype, device=size.device)


def closed(positions: Tensor, remaining: Tensor, present: Tensor) -> Tensor:
    """Positions with the gaps of missing tokens closed, row by row: int64 (axes, B, S).

    positions: int64 (axes, B, S). remaining: bool (B, P), prompt tokens that were not dropped. present: bool (B, P),
    those that are no padding.
    A value that no remaining token has on any axis is removed, and larger ones move down.
    """
    counted = positions.clone()
    length = remaining.shape[1]
    for row in range(remaining.shape[0]):
        prompt = positions[:, row, :length]
        used = sorted(set(prompt[:, remaining[row]].flatten().tolist()))
        top = int(prompt[:, present[row]].max()) + 1
        below = positions[:, row, :length, None] > torch.tensor(used, device=positions.device)
        counted[:, row, :length] = below.sum(-1)
        counted[:, row, length:] -= top - len(used)
    return counted
