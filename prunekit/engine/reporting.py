"""What the prefill of a prompt batch did, read back from its state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from prunekit.engine.asking import WIDER
from prunekit.engine.decoder.state import BatchState
from prunekit.engine.summary import summarise
from prunekit.engine.tower.record import tower_events, tower_tokens, tower_unsound, tower_works
from prunekit.records import RunReport


def report_of(state: BatchState) -> RunReport:
    """What the prefill of a prompt batch did; reads the decisions back from their device."""
    layers = state.bound.shape.layers
    every = [state.entering(number) for number in range(layers)]
    seen = {**tower_unsound(state.prompt), **state.unsound}
    unsound = {place: rows for place, found in seen.items() if (rows := found.nonzero()[:, 0].tolist())}
    return summarise(
        state.bound,
        state.plans,
        prompt_tokens=state.prompt.lengths,
        visual_tokens=state.prompt.visual_counts,
        kept_tokens=state.counts,
        events=(*tower_events(state.prompt), *(decision.event() for decision in state.decisions)),
        layer_tokens=_by_row(state.layer_tokens or every),
        layer_visual=_by_row(state.layer_visual or [state.counts] * layers),
        layer_keys=_by_row(state.layer_keys or [state.lengths] * layers),
        mlp_tokens=_by_row(state.mlp_tokens or every),
        notes=(*state.notes, *_unsound_notes(unsound, str(state.parts.base.dtype).removeprefix("torch."))),
        unsound=tuple(sorted({row for rows in unsound.values() for row in rows})),
        tower_tokens=tower_tokens(state.prompt),
        rungs=tuple(map(state.rung, range(len(state.counts)))) if state.bound.ladder else (),
        harms=tuple(state.harms.get(row, ()) for row in range(len(state.counts))) if state.bound.ladder else (),
        works=tower_works(state.prompt),
        itemsize=state.itemsize,
        wanted=state.wanted,
    )


def _unsound_notes(unsound: Mapping[str, Sequence[int]], dtype: str) -> Iterator[str]:
    """What was not finite, by the place where it was met, and of which samples."""
    for place, rows in unsound.items():
        met = "it wrote NaN or infinity" if place == "logits" else "it gave NaN or infinity to choose by"
        yield f"{place}, samples {', '.join(map(str, rows))}: the model computes in {dtype}, and {met}; {WIDER}"


def _by_row(layers: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
    return tuple(zip(*layers, strict=True))
