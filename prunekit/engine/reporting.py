"""What the prefill of a prompt batch did, read back from its state."""

from __future__ import annotations

from collections.abc import Sequence

from prunekit.engine.decoder.state import BatchState
from prunekit.engine.summary import summarise
from prunekit.engine.tower.record import tower_events, tower_tokens, tower_works
from prunekit.records import RunReport


def report_of(state: BatchState) -> RunReport:
    """What the prefill of a prompt batch did; reads the decisions back from their device."""
    layers = state.bound.shape.layers
    every = [state.entering(number) for number in range(layers)]
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
        notes=tuple(state.notes),
        tower_tokens=tower_tokens(state.prompt),
        works=tower_works(state.prompt),
        itemsize=state.itemsize,
        wanted=state.wanted,
    )


def _by_row(layers: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
    return tuple(zip(*layers, strict=True))
