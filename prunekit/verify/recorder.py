"""Notes what strategies return while a pipeline runs: merge weights and extras are no part of a report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prunekit.hookspecs import hookimpl
from prunekit.pipeline.build import Pipeline
from prunekit.strategy.decisions import Owners, Selection
from prunekit.strategy.sites import Site
from prunekit.verify.oracle import Merge

if TYPE_CHECKING:
    from prunekit.records import RunReport, StageEvent

NAME = "prunekit-testing-recorder"


@dataclass(frozen=True)
class Call:
    """One call of a token hook, of a batch or a sample: (B, V), (B, V, V + E) and (B, E, H), or without the B."""

    valid: Tensor
    weights: Tensor | None
    extras: Tensor | None


class Recorder:
    """Wraps the token hooks of all stages of a pipeline. calls: by stage and number of the cut, in order of time."""

    def __init__(self) -> None:
        self.calls: dict[tuple[str, int, int], list[Call]] = {}

    def merges(self, report: RunReport, beams: int = 1) -> dict[int, Merge]:
        """The merges of the one prompt batch that ran while recording, as `MaskedReference` takes them.

        beams: how many rows of the report belong to one prompt; the merges are those of the first of them.
        Raises ValueError for a merge inside the vision tower under beams, which repeat images.
        """
        merges: dict[int, Merge] = {}
        before: tuple[Sequence[int], ...] = tuple(range(count) for count in report.visual_tokens)
        pending = list(self.calls.items())
        for number, event in enumerate(report.events):
            # A router's cut, and a stage that no sample reached, ask nobody.
            if pending and pending[0][0][1] == event.index:
                calls = pending.pop(0)[1]
                merge = None if all(call.weights is None for call in calls) else _merge(calls, event, before)
                if merge is not None and Site.parse(event.site).in_tower:
                    if beams > 1:
                        raise ValueError(f"{event.stage} merges at {event.site}; under beams no reference follows it")
                    merges[number] = merge
                elif merge is not None:
                    extras = None if merge.extras is None else merge.extras[::beams]
                    merges[number] = Merge(merge.weights[::beams], extras)
            before = event.kept
        return merges

    def note(self, stage: tuple[str, int], cut: int, call: Call, again: bool = False) -> None:
        """Add a call, or with `again` replace the newest."""
        calls = self.calls.setdefault((*stage, cut), [])
        if again:
            calls.pop()
        calls.append(call)

    def wrapper(self, stage: tuple[str, int], extras: bool) -> object:
        """A plugin for the manager of a stage; it names `extras` only where the strategy declares some."""
        note = self.note

        class Wrapper:
            @hookimpl(wrapper=True)
            def select_tokens(self, valid: Tensor, sizes: Tensor, cut: int) -> Any:
                result = yield
                note(stage, cut, Call(valid, _weights(result, valid, sizes), _own_extras(result)))
                return result

            @hookimpl(wrapper=True)
            def merge_tokens(self, valid: Tensor, sizes: Tensor, cut: int) -> Any:
                weights = yield
                if weights is not None:
                    note(stage, cut, Call(valid, _matrix(weights, valid, sizes), None), again=True)
                return weights

        class WithExtras:
            @hookimpl(wrapper=True)
            def select_tokens(self, valid: Tensor, sizes: Tensor, cut: int, extras: Tensor) -> Any:
                result = yield
                own = _own_extras(result)
                note(stage, cut, Call(valid, _weights(result, valid, sizes), extras if own is None else own))
                return result

            @hookimpl(wrapper=True)
            def merge_tokens(self, valid: Tensor, sizes: Tensor, cut: int, extras: Tensor) -> Any:
                weights = yield
                if weights is not None:
                    note(stage, cut, Call(valid, _matrix(weights, valid, sizes), extras), again=True)
                return weights

        return WithExtras() if extras else Wrapper()


def _own_extras(result: Any) -> Tensor | None:
    return result.extras if isinstance(result, Selection) else None


def _weights(result: Any, valid: Tensor, sizes: Tensor) -> Tensor | None:
    return _matrix(result.weights, valid, sizes) if isinstance(result, Selection) else None


def _matrix(weights: Tensor | Owners | None, valid: Tensor, sizes: Tensor) -> Tensor | None:
    """A sparse merge as the matrix that it stands for, (..., V, V), group by group."""
    if not isinstance(weights, Owners):
        return weights
    width = valid.shape[-1]
    factors = {"mean": torch.ones_like(sizes), "size_mean": sizes, "sum": weights.amounts}[weights.mode]
    assert factors is not None
    rows = [_batch(one, 1) for one in (valid, weights.owner, factors)]
    matrix = torch.zeros(len(rows[0]), width, width, dtype=torch.float64)
    for b, (valid_row, owner_row, factor_row) in enumerate(zip(*rows, strict=True)):
        for anchor in range(width):
            group = [j for j in range(width) if valid_row[j] and owner_row[j] == anchor]
            total = 1.0 if weights.mode == "sum" else sum(float(factor_row[j]) for j in group)
            for j in group:
                matrix[b, anchor, j] = float(factor_row[j]) / total
    return matrix.view(*valid.shape, width)


def _merge(calls: Sequence[Call], event: StageEvent, before: Sequence[Sequence[int]]) -> Merge:
    """The merge of one event."""
    rows = [row for call in calls for row in _rows(call)]
    if Site.parse(event.site).in_tower:
        counts = [int(present) for call in calls for present in _batch(call.valid, 1).sum(-1)]
        matrices = zip((matrix for matrix, _ in rows), counts, strict=True)
        return Merge(tuple(torch.eye(count) if matrix is None else matrix for matrix, count in matrices))
    if len(rows) != len(event.entered):
        # A strategy that takes one sample at a time is not asked about samples without visual tokens.
        asked = iter(rows)
        rows = [next(asked) if count else (None, None) for count in event.entered]
    chosen = [[list(old).index(one) for one in new] for old, new in zip(before, event.kept, strict=True)]
    width = max((0 if extras is None else extras.shape[0]) for _, extras in rows)
    empty = next((extras[:0] for _, extras in rows if extras is not None), None)
    weights, extra = [], []
    for (matrix, extras), keep, many in zip(rows, chosen, event.entered, strict=True):
        weights.append(torch.eye(many, many + width)[keep] if matrix is None else matrix[keep])
        if empty is not None:
            behind = width if matrix is None else matrix.shape[1] - many
            extra.append(extras if extras is not None else empty.new_zeros(behind, empty.shape[-1]))
    return Merge(tuple(weights), tuple(extra) if empty is not None else None)


def _rows(call: Call) -> Iterator[tuple[Tensor | None, Tensor | None]]:
    """For each sample of a call: weights (entered, entered + E) of its real tokens, and extras (E, H)."""
    for row, present in enumerate(_batch(call.valid, 1)):
        extras = None if call.extras is None else _batch(call.extras, 2)[row].detach().clone()
        if call.weights is None:
            yield None, extras
            continue
        matrix = _batch(call.weights, 2)[row].detach()
        columns = torch.cat([present, present.new_ones(matrix.shape[-1] - len(present))])
        if len(columns) == len(present) and extras is not None:
            matrix = torch.cat([matrix, matrix.new_zeros(len(matrix), len(extras))], 1)
            columns = torch.cat([columns, columns.new_ones(len(extras))])
        yield matrix[present][:, columns], extras


def _batch(x: Tensor, axes: int) -> Tensor:
    """With a B axis: what a strategy that takes one sample at a time returns has `axes` axes."""
    return x[None] if x.ndim == axes else x


@contextmanager
def recorded(pipeline: Pipeline) -> Iterator[Recorder]:
    """Record what a pipeline's token stages return while this is open."""
    recorder = Recorder()
    stages = [stage for stage in pipeline.stages if stage.is_token]
    for stage in stages:
        stage.manager.register(recorder.wrapper((stage.use, stage.index), bool(stage.extras)), name=NAME)
    try:
        yield recorder
    finally:
        for stage in stages:
            stage.manager.unregister(name=NAME)
