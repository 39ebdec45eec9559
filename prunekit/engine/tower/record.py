"""What the vision tower recorded about images and videos, and how it meets the prompt that shows them.

Visual tokens that were dropped inside the tower leave the sequence at the decoder's input, before any stage there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prunekit.cost import TowerWork
from prunekit.engine.details import Detail
from prunekit.engine.prompt.prompt import Prompt, VisualInput
from prunekit.engine.tokens.layout import blank, take
from prunekit.engine.tower.effort import Effort
from prunekit.errors import Unsupported
from prunekit.families.tower_parts import Tower
from prunekit.pipeline.cut import Cut
from prunekit.records import StageEvent
from prunekit.strategy.inputs import request, requests
from prunekit.strategy.tower_requests import EncoderSpec, resolved


@dataclass(frozen=True)
class Decision:
    """A cut's answer, kept on its device until somebody asks for a report.

    entered, keep: bool (B, V) over all visual tokens of each input, those that entered and that stayed; tokens without
    a patch are in neither. asked: how many to keep of each, None for a stage that decides by itself. sizes: float
    (B, V) where the cut gave any. resized: height and width in pixels of each input, where it was made smaller.
    unsound: bool (B,), inputs of which something that the tower computed is not finite; None: nothing was asked.
    detail: what a trace tells of it, by numbers among the visual tokens of each input; None: no trace is wanted.
    """

    cut: Cut
    entered: Tensor
    keep: Tensor
    asked: tuple[int, ...] | None
    sizes: Tensor | None
    resized: tuple[tuple[int, int], ...] | None = None
    unsound: Tensor | None = None
    detail: Detail | None = None


@dataclass(frozen=True)
class TowerRecord:
    """What one call of an encoding method recorded, one entry for each of its images or videos.

    inputs: by resolved declaration, (V, ...), or (E, ...) of CLS tokens. extras: (E, H), the CLS tokens through the
    projector. kept: bool (V,), visual tokens that no cut dropped; None: there were no cuts. decisions: of the cuts.
    made: bool (B, V), visual tokens that have patches. rows: of the tower's batch, those of each input; a packed
    tower counts as one for each. block_tokens: for each block, the tokens of each row that entered it; empty without
    cuts. effort, dense: what the tower did for each, and does without any cut; None where that is not known.
    """

    inputs: dict[EncoderSpec, list[Tensor]]
    extras: list[Tensor] | None = None
    kept: list[Tensor] | None = None
    decisions: tuple[Decision, ...] = ()
    made: Tensor | None = None
    rows: tuple[tuple[int, ...], ...] = ()
    block_tokens: tuple[tuple[int, ...], ...] = ()
    effort: Effort | None = None
    dense: Effort | None = None


def of_declared(inputs: Mapping[str, Any], name: str, make: Callable[[Any], Tensor]) -> Any:
    """Input `name` of the tower as a strategy requests it: one tensor for one request, a tuple for a tuple."""
    declared = request(inputs, name)
    return tuple(map(make, declared)) if isinstance(declared, tuple) else make(declared)


def row_of_declared(inputs: Mapping[str, Any], name: str, value: Any, b: int, count: int, crops: int) -> Any:
    """Sample b of such an input, without padding: of its `count` visual tokens, or of its CLS tokens, one a crop."""
    parts = zip(value if isinstance(value, tuple) else (value,), requests(inputs, name), strict=True)
    rows = tuple(part[b, : crops if getattr(spec, "of", "patches") == "cls" else count] for part, spec in parts)
    return rows if isinstance(value, tuple) else rows[0]


def encoder_input(prompt: Prompt, tower: Tower | None, cut: Cut, name: str, ordinals: Tensor, valid: Tensor) -> Any:
    """Input `name` of the tower for a stage at the decoder's input or later.

    ordinals, valid: of the visual tokens that reach the stage, int64 and bool (B, V). Returns a tensor (B, V, ...), or
    (B, E, ...) of CLS tokens, or a tuple of them. Raises Unsupported for features that were encoded elsewhere.
    """
    assert tower is not None, "checked by TowerNeeds.of"

    def make(spec: EncoderSpec) -> Tensor:
        key = resolved(spec, cut.site, len(tower.layers), tower.feature_block)
        if getattr(spec, "of", "patches") == "cls":
            return _per_crop([[_recorded(one, key) for one in row] for row in prompt.by_row])
        return blank(take(_of_visual(prompt, key), ordinals, 1), valid)

    return of_declared(cut.stage.inputs, name, make)


def extras(prompt: Prompt) -> Tensor:
    """The projected CLS tokens of each row, float (B, E, H), zeros behind those of rows with fewer."""
    return _per_crop([[record.extras[one.at] for one, record in row if record.extras] for row in _by_row(prompt)])


def crops(prompt: Prompt) -> tuple[int, ...]:
    """How many crops, and so CLS tokens, each row shows."""
    return tuple(sum(len(record.rows[one.at]) for one, record in row if record.rows) for row in _by_row(prompt))


def crop_numbers(prompt: Prompt) -> Tensor:
    """Of which image or video each CLS token of a row is, and of which of its crops: int64 (B, E, 2), -1 on padding."""
    rows = [
        [(image, crop) for image, (one, record) in enumerate(row) for crop in range(len(record.rows[one.at]))]
        for row in _by_row(prompt)
    ]
    tables = [torch.tensor(row, dtype=torch.int64).view(-1, 2) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tables, batch_first=True, padding_value=-1)


def _by_row(prompt: Prompt) -> list[list[tuple[VisualInput, TowerRecord]]]:
    return [[(one, record_of(one.source)) for one in row] for row in prompt.by_row]


def record_of(source: Any, spec: EncoderSpec | None = None) -> TowerRecord:
    """What was recorded with `source`, with `spec` among it. Raises Unsupported for features that were encoded outside
    of the block, or in one whose pipeline read others of the tower.
    """
    record: TowerRecord | None = source.tower
    if record is None or (spec is not None and spec not in record.inputs):
        raise Unsupported(
            f"these {source.modality.name} features were encoded outside of this prunekit.apply block, but its "
            "pipeline cuts or reads the vision tower; give the pixels, or encode inside the block"
        )
    return record


def _recorded(one: VisualInput, spec: EncoderSpec) -> Tensor:
    """A recorded input of one image or video."""
    return record_of(one.source, spec).inputs[spec][one.at]


def _of_visual(prompt: Prompt, spec: EncoderSpec) -> Tensor:
    """A recorded input of all original visual tokens of each row, float (B, V, ...); zeros on padding and text rows."""
    table: Tensor | None = None
    for b, row in enumerate(prompt.by_row):
        for one in row:
            value = _recorded(one, spec)
            if table is None:
                table = value.new_zeros(*prompt.ids.shape, *value.shape[1:])
            table[b, one.positions.to(table.device)] = value.to(table)
    assert table is not None
    return prompt.of_visual(table, 0)


def _per_crop(rows: list[list[Tensor]]) -> Tensor:
    some = next(one for row in rows for one in row)
    empty = some.new_zeros(0, *some.shape[1:])
    return torch.nn.utils.rnn.pad_sequence([torch.cat([empty, *row]) for row in rows], batch_first=True)


def dropped_in_tower(prompt: Prompt) -> Tensor | None:
    """Which visual tokens were dropped inside the tower, bool (B, S); None: there were no cuts."""
    dropped = torch.zeros_like(prompt.real)
    cuts = False
    for b, row in enumerate(_by_row(prompt)):
        for one, record in row:
            if record.kept is not None:
                cuts = True
                dropped[b, one.positions] = ~record.kept[one.at].to(dropped.device)
    return dropped if cuts else None


def _records(prompt: Prompt) -> Iterator[TowerRecord]:
    return (source.tower for source in prompt.sources if source.tower is not None)


def tower_tokens(prompt: Prompt) -> tuple[tuple[int, ...], ...]:
    """Tokens of each sample that entered each block of the vision tower, all its inputs together; () without cuts."""
    blocks = max((len(record.block_tokens) for record in _records(prompt)), default=0)
    if not blocks:
        return ()
    return tuple(
        tuple(
            sum(record.block_tokens[block][of] for one, record in row for of in record.rows[one.at])
            for block in range(blocks)
        )
        for row in _by_row(prompt)
    )


# What was done for an image or video, and what is done without any cut.
Works = tuple[TowerWork, TowerWork]


def tower_works(prompt: Prompt) -> tuple[tuple[Works, ...], ...] | None:
    """What the tower did for each image or video of each sample; None where that is not known of all of them."""
    try:
        rows = prompt.by_row
    except Unsupported:  # features that do not fit the prompt, say: nothing is known of them
        return None
    every = [[_works(one) for one in row] for row in rows]
    known = [tuple(works for works in row if works is not None) for row in every]
    return tuple(known) if list(map(len, known)) == list(map(len, every)) else None


def _works(one: VisualInput) -> Works | None:
    record: TowerRecord | None = one.source.tower
    if record is None or record.effort is None or record.dense is None:
        return None
    did, dense = record.effort.works, record.dense.works
    return None if did is None or dense is None else (did[one.at], dense[one.at])


def tower_events(prompt: Prompt) -> list[StageEvent]:
    """The cuts inside the tower as events of the prompt batch, in the order of the data."""
    first = next(_records(prompt), TowerRecord({}))
    return [_event(prompt, number, decision) for number, decision in enumerate(first.decisions)]


def _event(prompt: Prompt, number: int, like: Decision) -> StageEvent:
    entered, kept, asked, sizes, resized = [], [], [], [], []
    for b, row in enumerate(_by_row(prompt)):
        before, wanted, after, of_row, shown = 0, 0, [], [], []
        for one, record in row:
            decision, at, count = record.decisions[number], one.at, len(one.positions)
            assert record.made is not None
            apart = ~record.made[at, :count]  # visual tokens without patches, which no cut in the tower can drop
            before += int((decision.entered[at, :count] | apart).sum())
            wanted += int(apart.sum()) + (0 if decision.asked is None else decision.asked[at])
            stay = (decision.keep[at, :count] | apart).to(prompt.ordinals.device)
            after += prompt.ordinals[b, one.positions][stay].tolist()
            shown += [] if decision.resized is None else [decision.resized[at]]
            if decision.sizes is not None:
                of_row += decision.sizes[at, :count].masked_fill(apart, 1)[stay.to(decision.sizes.device)].tolist()
        entered.append(before)
        asked.append(wanted)
        kept.append(tuple(after))
        sizes.append(tuple(of_row))
        resized.append(tuple(shown))
    cut, of_each = like.cut, tuple(sizes) if like.sizes is not None else None
    return StageEvent(
        cut.stage.use, cut.stage.index, str(cut.site), tuple(entered), tuple(kept), False, of_each,
        None if like.asked is None else tuple(asked), None if like.resized is None else tuple(resized),
    )  # fmt: skip


def tower_unsound(prompt: Prompt) -> dict[str, Tensor]:
    """By the cut in the tower, the samples of whose images something that it computed is not finite: bool (B,)."""
    found: dict[str, Tensor] = {}
    first = next(_records(prompt), TowerRecord({}))
    for number, decision in enumerate(first.decisions):
        if decision.unsound is not None:
            cut = decision.cut
            found[f"{cut.stage.label} at '{cut.site}'"] = torch.tensor(
                [any(_is_unsound(record.decisions[number], one.at) for one, record in row) for row in _by_row(prompt)]
            )
    return found


def _is_unsound(decision: Decision, at: int) -> bool:
    return decision.unsound is not None and bool(decision.unsound[at])
