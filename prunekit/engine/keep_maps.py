"""What became of every visual token of a prompt batch, read back from its state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prunekit.engine.decoder.state import BatchState, Decision
from prunekit.engine.details import Detail, RowDetail
from prunekit.engine.prompt.prompt import Prompt, VisualInput
from prunekit.engine.tower.record import record_of
from prunekit.errors import Unsupported
from prunekit.records import RunReport, SampleTrace, StageTrace, Trace, VisualTokens


def trace_of(state: BatchState, report: RunReport) -> Trace:
    """What became of every visual token; reads decisions back from their device. report: of the same batch."""
    in_tower = len(report.events) - len(state.decisions)
    samples = []
    for b in range(report.samples):
        details = [_of_tower(state.prompt, number, b) for number in range(in_tower)]
        details += [_of_decision(decision, b) for decision in state.decisions]
        samples.append(SampleTrace(_inputs(state.prompt, b), _stages(report, details, b)))
    return Trace(report, tuple(samples))


def _stages(report: RunReport, details: Sequence[RowDetail], b: int) -> tuple[StageTrace, ...]:
    """A stage sees what the one before it has kept."""
    entered, stages = tuple(range(report.visual_tokens[b])), []
    for number, (event, detail) in enumerate(zip(report.events, details, strict=True)):
        kept = event.kept[b]
        gone = sorted(set(entered) - set(kept) - set(detail.joins))
        stages.append(StageTrace(number, entered, kept, detail.joins, tuple(gone), detail.scores))
        entered = kept
    return tuple(stages)


def _of_decision(decision: Decision, b: int) -> RowDetail:
    return Detail(decision.ordinals, decision.entered, decision.selection, decision.scores).row(b)


def _of_tower(prompt: Prompt, number: int, b: int) -> RowDetail:
    """Decision `number` in the tower, over all images and videos of row b."""
    joins: dict[int, tuple[int, ...]] = {}
    scores: dict[int, float] = {}
    scored = False
    for one in prompt.by_row[b]:
        detail = record_of(one.source).decisions[number].detail
        if detail is None:
            continue
        of_input, names = detail.row(one.at), _ordinals(prompt, b, one)
        joins |= {names[token]: tuple(names[into] for into in many) for token, many in of_input.joins.items()}
        scores |= {names[token]: score for token, score in (of_input.scores or {}).items()}
        scored = scored or of_input.scores is not None
    return RowDetail(_ascending(joins), scores if scored else None)


def _ascending(joins: Mapping[int, tuple[int, ...]]) -> dict[int, tuple[int, ...]]:
    return dict(sorted(joins.items()))


def _inputs(prompt: Prompt, b: int) -> tuple[VisualTokens, ...]:
    try:
        row = prompt.by_row[b]
    except Unsupported as error:  # features that do not fit the prompt, say: which image a token is of is not known
        every = tuple(range(prompt.visual_counts[b]))
        return (VisualTokens("image", every, None, unknown=str(error)),) if every else ()
    return tuple(_visual_tokens(prompt, b, one) for one in row)


def _visual_tokens(prompt: Prompt, b: int, one: VisualInput) -> VisualTokens:
    kind, names = one.source.modality.name, _ordinals(prompt, b, one)
    try:
        coords = tuple(map(tuple, one.source.coords[one.at].tolist()))
        return VisualTokens(kind, names, coords, one.source.joined[one.at])
    except Unsupported as error:
        return VisualTokens(kind, names, None, unknown=str(error))


def _ordinals(prompt: Prompt, b: int, one: VisualInput) -> tuple[int, ...]:
    """The tokens of an image or video as numbers among the row's visual tokens."""
    return tuple(prompt.ordinals[b, one.positions].tolist())
