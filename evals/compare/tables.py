"""From cells to comparison tables: one table for each set of conditions, one row for each pipeline, dense first."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from prunekit_evals.compare import stats
from prunekit_evals.compare.stats import Estimate
from prunekit_evals.run import results
from prunekit_evals.run.results import Cell, Conditions

from prunekit import loading
from prunekit.errors import InputError

MICRO = "micro"  # the bundled model


@dataclass(frozen=True)
class Row:
    """One pipeline. Tasks that it lacks, or that failed, are missing from `tasks`.

    tasks: label -> accuracy. average: unweighted over the tasks that all rows have. difference: paired, to dense, mean
    over those tasks. Fractions and ratios are means over tasks, of the dense model; None where not known.
    """

    pipeline: str
    sha: str
    dense: bool
    tasks: dict[str, Estimate]
    average: Estimate | None
    difference: Estimate | None
    visual_tokens: float | None
    kept_tokens: float | None
    flops_fraction: float | None
    kv_fraction: float | None
    prefill_ratio: float | None
    seconds: float | None
    whole_flops_fraction: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dump`."""
        return asdict(self)


@dataclass(frozen=True)
class Table:
    """Rows that may be compared: equal model, data, limit, batch size, dtype and versions.

    shared: tasks that every row has, which the averages are over. notes: what a reader should know.
    """

    conditions: Conditions
    tasks: tuple[str, ...]
    shared: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dump`."""
        return {
            "conditions": asdict(self.conditions),
            "tasks": list(self.tasks),
            "averaged_over": list(self.shared),
            "rows": [row.to_json() for row in self.rows],
            "notes": list(self.notes),
        }


def tables(folder: Path) -> tuple[Table, ...]:
    """Tables of all cells under `folder`, the newest conditions last. Raises InputError when there are none."""
    if not folder.is_dir():
        raise InputError(f"no results folder '{folder}' (make one with `prunekit eval`, or name another)")
    cells = list(results.cells(folder))
    if not cells:
        raise InputError(f"no results under '{folder}' (make some with `prunekit eval`)")
    return tuple(_marked(table) for table in of_cells(cells))


def _marked(table: Table) -> Table:
    """With a note where the bundled model has been replaced since."""
    told = table.conditions
    if told.model != MICRO:
        return table
    now = loading.model_identity(loading.resolve(MICRO))
    if now == told.identity:
        return table
    note = f"stale: {MICRO} was {told.identity} and is {now} now; evaluate again to compare with new results"
    return replace(table, notes=(*table.notes, note))


def of_cells(cells: Iterable[Cell]) -> tuple[Table, ...]:
    """Tables of these cells, the newest conditions last."""
    groups: dict[str, list[Cell]] = {}
    for cell in sorted(cells, key=lambda cell: cell.created):
        groups.setdefault(repr(asdict(cell.conditions)), []).append(cell)
    ordered = sorted(groups.values(), key=lambda group: group[-1].created)
    return tuple(_table(group) for group in ordered)


def _table(cells: Sequence[Cell]) -> Table:
    """`cells`: of one set of conditions, oldest first."""
    notes = [f"{cell.pipeline.name} on {cell.label} failed: {cell.error}" for cell in cells if cell.status == "failed"]
    notes += [
        f"{cell.pipeline.name} on {cell.label}: the model computed NaN or infinity for {cell.unsound} questions"
        for cell in cells
        if cell.unsound
    ]
    newest: dict[str, tuple[str, str]] = {}
    for cell in cells:
        newest[cell.pipeline.name] = (cell.pipeline.sha, cell.pipeline.code)
    by_pipeline: dict[str, dict[str, Cell]] = {}
    older = 0
    for cell in cells:
        if (cell.pipeline.sha, cell.pipeline.code) != newest[cell.pipeline.name]:
            older += 1
        elif cell.status == "done":
            by_pipeline.setdefault(cell.pipeline.name, {})[cell.label] = cell
    if older:
        notes.append(f"{older} cells of older versions of these pipelines are not shown")
    labels = tuple(dict.fromkeys(cell.label for cell in cells))
    scored = [{label for label, cell in row.items() if cell.scores} for row in by_pipeline.values()]
    shared = tuple(label for label in labels if scored and all(label in has for has in scored))
    if scored and len(shared) < len(labels):
        notes.append(f"averages are over {', '.join(shared) or 'no task'}: not every pipeline has the other tasks")
    dense = next((row for row in by_pipeline.values() if next(iter(row.values())).pipeline.dense), None)
    if dense is None and by_pipeline:
        notes.append("no dense row, so no differences: evaluate without --no-dense")
    rows = sorted((_row(row, dense, shared) for row in by_pipeline.values()), key=_order)
    return Table(cells[-1].conditions, labels, shared, tuple(rows), tuple(dict.fromkeys(notes)))


def _order(row: Row) -> tuple[bool, float, float, str]:
    """Dense first, then from what costs most to what costs least; at equal cost the better one first."""
    cost = row.flops_fraction if row.flops_fraction is not None else 1.0
    return not row.dense, -round(cost, 3), -(row.average.value if row.average else 0.0), row.pipeline


def _row(cells: dict[str, Cell], dense: dict[str, Cell] | None, shared: Sequence[str]) -> Row:
    first = next(iter(cells.values()))
    accuracy = {label: stats.wilson(cell.scores.values()) for label, cell in cells.items() if cell.scores}
    difference = None
    if dense is not None and not first.pipeline.dense:
        pairs = [
            stats.paired(cells[label].scores, dense[label].scores, cells[label].groups)
            for label in shared
            if label in dense
        ]
        difference = stats.average(pair for pair in pairs if pair is not None)
    spared = [cell.saved for cell in cells.values() if cell.saved is not None]
    timed = [cell.timing for cell in cells.values() if cell.timing is not None]
    return Row(
        pipeline=first.pipeline.name,
        sha=first.pipeline.sha,
        dense=first.pipeline.dense,
        tasks=accuracy,
        average=stats.average(accuracy[label] for label in shared),
        difference=difference,
        visual_tokens=_mean(one.visual_tokens for one in spared),
        kept_tokens=_mean(one.kept_tokens for one in spared),
        flops_fraction=_mean(one.flops_fraction for one in spared),
        kv_fraction=_mean(one.kv_fraction for one in spared),
        prefill_ratio=_mean(one.prefill_ratio for one in timed),
        seconds=_mean(one.seconds for one in timed),
        whole_flops_fraction=_mean(one.whole_flops_fraction for one in spared),
    )


def _mean(values: Iterable[float | None]) -> float | None:
    measured = [value for value in values if value is not None]
    return statistics.fmean(measured) if measured else None
