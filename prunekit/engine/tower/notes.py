"""What the vision tower noted about pictures, and how it meets the prompt that shows them.

Visual tokens that were dropped inside the tower leave the sequence at the decoder's door, before any stage there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prunekit.errors import Unsupported
from prunekit.records import StageEvent
from prunekit.strategy.tower_requests import EncoderSpec, Features

if TYPE_CHECKING:
    from prunekit.engine.prompt.prompt import Prompt
    from prunekit.engine.tower.plan import TowerPlan
    from prunekit.engine.tower.run import TowerDecision, TowerRun


@dataclass(frozen=True)
class TowerNotes:
    """What one call of an encoding method noted, one entry for each of its pictures.

    inputs: by resolved declaration, (V, ...), or (E, ...) of CLS tokens. extras: (E, H), the CLS tokens through the
    projector. left: bool (V,), visual tokens that no cut dropped; None: there were no cuts. decisions: of the cuts.
    made: bool (B, V), visual tokens that have patches. rows: of the tower's batch, those of each picture; a packed
    tower counts as one for each. block_tokens: for each block, the tokens of each row that entered it; empty without
    cuts.
    """

    inputs: dict[EncoderSpec, list[Tensor]]
    extras: list[Tensor] | None
    left: list[Tensor] | None
    decisions: tuple[TowerDecision, ...]
    made: Tensor | None
    rows: tuple[tuple[int, ...], ...]
    block_tokens: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, run: TowerRun, plan: TowerPlan, features: Sequence[Tensor]) -> TowerNotes:
        """After the call. Raises Unsupported when visual tokens are not those that the family's file says."""
        counts = tuple(len(picture) for picture in features)
        if not run.settle() and not plan.needs_blocks:
            return cls({spec: [one.detach() for one in features] for spec in plan.noted}, None, None, (), None, (), ())
        if run.units.counts != counts:
            raise Unsupported(
                f"the encoder made {counts} visual tokens, the family's file expects {run.units.counts} of this tower; "
                "use stages that neither cut nor read the vision tower"
            )
        inputs = {spec: _of_pictures(run, spec, features, counts) for spec in plan.noted}
        extras = None
        if plan.extras and plan.tower.projector is not None:
            feature = run.states[plan.tower.feature_block][:, 0]
            extras = [plan.tower.projector(feature[list(rows)]) for rows in run.units.rows]
        left = None
        if plan.cuts:
            left = [(run.present | ~run.units.there)[b, :count] for b, count in enumerate(counts)]
        rows, whole = run.units.rows, run.whole
        if plan.tower.packed:  # one row holds all; counted picture by picture
            rows = tuple((picture,) for picture in range(len(counts)))
        blocks = range(len(plan.tower.layers) if plan.cuts else 0)
        entered = tuple(run.block_tokens.get(number, whole) for number in blocks)
        return cls(inputs, extras, left, tuple(run.decisions), run.units.there, rows, entered)


def _of_pictures(run: TowerRun, spec: EncoderSpec, features: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
    if isinstance(spec, Features) and spec.projected:
        return [picture.detach() for picture in features]
    table = run.table(spec)
    if getattr(spec, "of", "patches") == "cls":
        return [table[picture, : len(rows)] for picture, rows in enumerate(run.units.rows)]
    return [table[picture, :count] for picture, count in enumerate(counts)]


def notes_of(source: Any) -> TowerNotes:
    """What was noted about the pictures of `source`. Raises Unsupported for pictures encoded outside of the block."""
    found: TowerNotes | None = source.tower.get("notes")
    if found is None:
        raise Unsupported(
            f"these {source.modality.name} features were encoded outside of this prunekit.apply block, but its "
            "pipeline cuts or reads the vision tower; give the pixels, or encode inside the block"
        )
    return found


def encoder_input(prompt: Prompt, spec: EncoderSpec) -> Tensor:
    """A noted input of all original visual tokens of each row, float (B, V, ...); zeros on padding and text rows."""
    table: Tensor | None = None
    for b, pictures in enumerate(prompt.by_row):
        for picture in pictures:
            found = notes_of(picture.source).inputs[spec][picture.at]
            if table is None:
                table = found.new_zeros(*prompt.ids.shape, *found.shape[1:])
            table[b, picture.positions.to(table.device)] = found.to(table)
    assert table is not None
    return prompt.of_visual(table, 0)


def per_row(prompt: Prompt, spec: EncoderSpec | None) -> Tensor:
    """The CLS tokens of each row, float (B, E, ...), zeros behind those of rows with fewer; None: the extras."""
    rows = []
    for pictures in prompt.by_row:
        found = []
        for picture in pictures:
            notes = notes_of(picture.source)
            entries = notes.extras if spec is None else notes.inputs[spec]
            assert entries is not None
            found.append(entries[picture.at])
        rows.append(found)
    some = next(one for row in rows for one in row)
    blank = some.new_zeros(0, *some.shape[1:])
    return torch.nn.utils.rnn.pad_sequence([torch.cat([blank, *row]) for row in rows], batch_first=True)


def dropped_in_tower(prompt: Prompt) -> Tensor | None:
    """Which visual tokens were dropped inside the tower, bool (B, S); None: there were no cuts."""
    gone = torch.zeros_like(prompt.real)
    cuts = False
    for b, pictures in enumerate(prompt.by_row):
        for picture in pictures:
            left = notes_of(picture.source).left
            if left is not None:
                cuts = True
                gone[b, picture.positions] = ~left[picture.at].to(gone.device)
    return gone if cuts else None


def tower_tokens(prompt: Prompt) -> tuple[tuple[int, ...], ...]:
    """Tokens of each sample that entered each block of the vision tower, all its pictures together; () without cuts."""
    known: list[TowerNotes | None] = [source.tower.get("notes") for source in prompt.pictures]
    blocks = max((len(notes.block_tokens) for notes in known if notes is not None), default=0)
    if not blocks:
        return ()
    found = [[0] * blocks for _ in prompt.by_row]
    for b, pictures in enumerate(prompt.by_row):
        for picture in pictures:
            notes = notes_of(picture.source)
            for number, entered in enumerate(notes.block_tokens):
                found[b][number] += sum(entered[row] for row in notes.rows[picture.at])
    return tuple(map(tuple, found))


def tower_events(prompt: Prompt) -> list[StageEvent]:
    """The cuts inside the tower as events of the prompt batch, in the order of the data."""
    known: list[TowerNotes | None] = [source.tower.get("notes") for source in prompt.pictures]
    first = next((notes for notes in known if notes is not None), None)
    decisions = () if first is None else first.decisions
    return [_event(prompt, number, decision) for number, decision in enumerate(decisions)]


def _event(prompt: Prompt, number: int, like: TowerDecision) -> StageEvent:
    entered, kept, sizes = [], [], []
    for b, pictures in enumerate(prompt.by_row):
        before, after, of_row = 0, [], []
        for picture in pictures:
            notes = notes_of(picture.source)
            decision, at = notes.decisions[number], picture.at
            count = len(picture.positions)
            assert notes.made is not None
            apart = ~notes.made[at, :count]
            before += int((decision.left[at, :count] | apart).sum())
            stay = (decision.keep[at, :count] | apart).to(prompt.ordinals.device)
            after += prompt.ordinals[b, picture.positions][stay].tolist()
            if decision.sizes is not None:
                of_row += decision.sizes[at, :count].masked_fill(apart, 1)[stay.to(decision.sizes.device)].tolist()
        entered.append(before)
        kept.append(tuple(after))
        sizes.append(tuple(of_row))
    given = tuple(sizes) if like.sizes is not None else None
    cut = like.cut
    return StageEvent(cut.stage.use, cut.stage.index, str(cut.site), tuple(entered), tuple(kept), False, given)
