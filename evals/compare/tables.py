"""From cells to comparison tables: one table for each set of conditions, one row for each pipeline, dense first."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from prunekit_evals.compare import judging, pooling
from prunekit_evals.compare.judging import Comparison, Contender, Judged
from prunekit_evals.compare.pooling import Pooled, mean
from prunekit_evals.compare.stats import Estimate
from prunekit_evals.run import reading
from prunekit_evals.run.reading import Skipped
from prunekit_evals.run.results import Cell, Conditions
from prunekit_evals.run.unanswered import listed

from prunekit import loading
from prunekit.errors import InputError

MICRO = "micro"  # the bundled model


@dataclass(frozen=True)
class Row:
    """One pipeline under all its seeds. Tasks that it lacks, or that failed, are missing from `tasks`.

    tasks: label -> accuracy. average: unweighted over the tasks that all rows have. to_dense, to_random: against dense
    and against `random` at the same FLOPs, over those tasks; None where there is no such row. seeds: the average under
    each seed; empty with one. Fractions and ratios are means over tasks, of the dense model; None where not known.
    hard: accuracy on the questions that a row of `downsample` gets wrong, all tasks together; None where there are none
    (https://arxiv.org/abs/2510.07143 calls them difficult: they are what tells methods apart).
    times: machine -> ratio of prefill times measured on it. prefill_ratio: that of the table's one machine; None where
    it has several, whose times are not comparable.
    """

    pipeline: str
    sha: str
    dense: bool
    tasks: dict[str, Estimate]
    average: Estimate | None
    to_dense: Comparison | None
    to_random: Comparison | None
    visual_tokens: float | None
    kept_tokens: float | None
    flops_fraction: float | None
    kv_fraction: float | None
    prefill_ratio: float | None
    seconds: float | None
    whole_flops_fraction: float | None = None
    seeds: tuple[float, ...] = ()
    hard: Estimate | None = None
    times: dict[str, float] = field(default_factory=dict)

    @property
    def difference(self) -> Estimate | None:
        """The paired difference to dense."""
        return self.to_dense.difference if self.to_dense else None

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dump`."""
        data = asdict(self)
        for name, one in (("to_dense", self.to_dense), ("to_random", self.to_random)):
            if one is not None:
                data[name]["holds"] = one.holds
        return {**data, "difference": data["to_dense"] and data["to_dense"]["difference"]}


@dataclass(frozen=True)
class Table:
    """Rows that may be compared: equal model, data, limit, batch size, dtype and versions.

    shared: tasks that every row has, which the averages are over. notes: what a reader should know. best: pruned rows
    that could each be the best. verdicts: which differences hold, in words. images: task -> images that it asks about.
    machines: on which prefill times were measured. hard: how many questions downsampling gets wrong.
    """

    conditions: Conditions
    tasks: tuple[str, ...]
    shared: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    best: tuple[str, ...] = ()
    verdicts: tuple[str, ...] = ()
    images: dict[str, int] = field(default_factory=dict)
    machines: tuple[str, ...] = ()
    hard: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dump`."""
        return {
            "conditions": asdict(self.conditions),
            "tasks": list(self.tasks),
            "averaged_over": list(self.shared),
            "rows": [row.to_json() for row in self.rows],
            "notes": list(self.notes),
            "could_be_best": list(self.best),
            "verdicts": list(self.verdicts),
            "images": dict(self.images),
            "machines": list(self.machines),
            "hard": self.hard,
        }


def tables(folder: Path) -> tuple[tuple[Table, ...], tuple[Skipped, ...]]:
    """Tables of all cells under `folder`, the newest conditions last, and files that are no sound cells.

    Raises InputError when there are no cells.
    """
    found = reading.read([folder])
    if not found.cells:
        lost = "".join(f"\n  {one}" for one in found.skipped)
        skipped = f"; {len(found.skipped)} files skipped:{lost}" if lost else ""
        raise InputError(f"no results under '{folder}' (make some with `prunekit eval`){skipped}")
    return tuple(marked(table) for table in of_cells(found.cells)), found.skipped


def marked(table: Table) -> Table:
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
    return tuple(_table(group) for group in grouped(cells))


def grouped(cells: Iterable[Cell]) -> list[list[Cell]]:
    """The cells of each table, oldest first: those of equal conditions; the newest conditions last.

    A failure stands there only while there is no newer result of that cell, under whichever versions.
    """
    groups: dict[str, list[Cell]] = {}
    for cell in pooling.unsettled(sorted(cells, key=lambda cell: cell.created)):
        groups.setdefault(repr(cell.conditions), []).append(cell)
    return sorted(groups.values(), key=lambda group: group[-1].created)


def _table(cells: Sequence[Cell]) -> Table:
    """`cells`: of one set of conditions, oldest first."""
    labels = tuple(dict.fromkeys(cell.label for cell in cells))
    newest, older = pooling.newest(cells)
    rows, left_out = pooling.pooled(newest)
    scored = [set(row.scores) for row in rows]
    shared = tuple(label for label in labels if scored and all(label in has for has in scored))
    images, without = pooling.images(rows)
    contenders = [Contender(row.name, row.dense, row.random, row.flops, row.scores) for row in rows]
    hard = pooling.hard(rows)
    judged, best = judging.judge(contenders, shared, images, hard)
    machines = tuple(dict.fromkeys(machine for row in rows for machine in times(row)))
    ordered = tuple(sorted((_row(row, judged[row.name], machines) for row in rows), key=_order))
    notes = [*_troubles(cells), *left_out, *_machines(machines)]
    if older:
        notes.append(f"{older} cells of older versions of these pipelines are not shown")
    if scored and len(shared) < len(labels):
        notes.append(f"averages are over {', '.join(shared) or 'no task'}: not every pipeline has the other tasks")
    if rows and not any(row.dense for row in rows):
        notes.append("no dense row, so no differences to it: evaluate without --no-dense")
    if without:
        named = ", ".join(without)
        notes.append(f"results of {named} name no image for some questions: each of them counts as its own image")
    counted = {label: len(set(of.values())) for label, of in images.items()}
    verdicts = judging.sentences({row.pipeline: judged[row.pipeline] for row in ordered}, best)
    told = tuple(dict.fromkeys(notes))
    asked = sum(map(len, hard.values()))
    return Table(cells[-1].conditions, labels, shared, ordered, told, best, verdicts, counted, machines, asked)


def times(row: Pooled) -> dict[str, float]:
    """Machine -> ratio of prefill times measured on it, mean over cells."""
    ratios: dict[str, list[float]] = {}
    for one in (cell.timing for cell in row.cells):
        if one is not None and one.prefill_ratio is not None:
            ratios.setdefault(one.machine, []).append(one.prefill_ratio)
    return {machine: statistics.fmean(of_one) for machine, of_one in ratios.items()}


def _machines(machines: Sequence[str]) -> list[str]:
    """What the columns of times mean where there are several."""
    if len(machines) < 2:
        return []
    named = (f"Time {number} on {machine or 'a machine without a name'}" for number, machine in enumerate(machines, 1))
    return [f"times of different machines are not comparable: {'; '.join(named)}"]


def _troubles(cells: Sequence[Cell]) -> list[str]:
    failed = [f"{cell.pipeline.name} on {cell.label} failed: {cell.error}" for cell in cells if cell.status == "failed"]
    return failed + [f"{cell.pipeline.name} on {cell.label}: {said}" for cell in cells for said in _flags(cell)]


def _flags(cell: Cell) -> Iterator[str]:
    """What a reader of a result should know."""
    if cell.unsound:
        yield f"the model computed NaN or infinity for {cell.unsound} questions"
    if lost := cell.unanswered:
        many = "questions" if len(lost) > 1 else "question"
        yield f"{len(lost)} {many} could not be answered, counted as wrong: {listed(lost)}"
    if cell.empty:
        yield f"{cell.empty} of {len(cell.questions)} answers are empty"
    if cell.executed is not None and cell.executed.off_budget:
        off = f"{cell.executed.off_budget} of {len(cell.questions)} questions"
        yield f"stages kept another number of tokens than their budgets asked for, in {off}"


def _order(row: Row) -> tuple[bool, float, float, str]:
    """Dense first, then from what costs most to what costs least; at equal cost the better one first."""
    cost = row.flops_fraction if row.flops_fraction is not None else 1.0
    return not row.dense, -round(cost, 3), -(row.average.value if row.average else 0.0), row.pipeline


def _row(row: Pooled, judged: Judged, machines: Sequence[str]) -> Row:
    """machines: of the whole table."""
    first, ratios = row.cells[0], times(row)
    spared = [cell.saved for cell in row.cells if cell.saved is not None]
    timed = [cell.timing for cell in row.cells if cell.timing is not None]
    return Row(
        pipeline=row.name,
        sha=first.pipeline.sha,
        dense=first.pipeline.dense,
        tasks=judged.tasks,
        average=judged.average,
        to_dense=judged.to_dense,
        to_random=judged.to_random,
        visual_tokens=mean(one.visual_tokens for one in spared),
        kept_tokens=mean(one.kept_tokens for one in spared),
        flops_fraction=row.flops,
        kv_fraction=mean(one.kv_fraction for one in spared),
        prefill_ratio=ratios.get(machines[0]) if len(machines) == 1 else None,
        seconds=mean(one.seconds for one in timed) if len(machines) < 2 else None,
        whole_flops_fraction=mean(one.whole_flops_fraction for one in spared),
        seeds=judged.seeds,
        hard=judged.hard,
        times=ratios,
    )
