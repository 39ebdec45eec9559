"""From cells to a board: a section for each set of conditions, an entry for each row with all that stands behind it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from prunekit_evals.compare import pooling, tables
from prunekit_evals.compare.pooling import Pooled
from prunekit_evals.compare.tables import Row, Table
from prunekit_evals.leaderboard import commands
from prunekit_evals.leaderboard.commands import Chosen, Run
from prunekit_evals.run.results import Cell, Conditions

# What every method has to beat, by the strategy that it is made of, and the shipped pipeline that adds it.
BASELINES = {"dense": "dense", "random": "random-r25", "pool": "pool-r25", "downsample": "downsample-half"}


@dataclass(frozen=True)
class Entry:
    """One row. baseline: which of `BASELINES` it is, or empty. best: whether it could be the best pruned row."""

    row: Row
    cells: tuple[Cell, ...]
    baseline: str
    best: bool
    seeds: tuple[str, ...]
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class Missing:
    """A baseline that no row is, and what makes it."""

    baseline: str
    command: str

    def __str__(self) -> str:
        return f"no {self.baseline} row, which every method has to beat; make it: {self.command}"


@dataclass(frozen=True)
class Section:
    """What may be compared with each other. apart: the conditions in which it differs from other sections.

    chosen: the questions, where they were named one by one.
    """

    table: Table
    entries: tuple[Entry, ...]
    missing: tuple[Missing, ...]
    apart: dict[str, str]
    chosen: Chosen | None = None


@dataclass(frozen=True)
class Board:
    """Sections, of the newest conditions first. cells: how many cells the rows rest on."""

    sections: tuple[Section, ...]
    cells: int


def of_cells(cells: Iterable[Cell]) -> Board:
    """The board of these cells; conditions under which everything failed have no section."""
    groups = tables.grouped(cells)
    apart = _apart([group[0].conditions for group in groups])
    made = [_section(group, differing) for group, differing in zip(groups, apart, strict=True)]
    sections = tuple(one for one in reversed(made) if one.entries)
    return Board(sections, sum(len(entry.cells) for one in sections for entry in one.entries))


def _section(cells: Sequence[Cell], apart: dict[str, str]) -> Section:
    """`cells`: of one set of conditions, oldest first."""
    (table,) = (tables.marked(one) for one in tables.of_cells(cells))
    pooled = {row.name: row for row in pooling.pooled(pooling.newest(cells)[0])[0]}
    entries = tuple(_entry(row, pooled[row.pipeline], table) for row in table.rows)
    there = {entry.baseline for entry in entries}
    missing = tuple(
        Missing(name, commands.command(pipeline, table.conditions, table.tasks))
        for name, pipeline in BASELINES.items() if name not in there
    )  # fmt: skip
    answered = [cell for entry in entries for cell in entry.cells]
    return Section(table, entries, missing, apart, commands.chosen_of(answered) if answered else None)


def _entry(row: Row, pooled: Pooled, table: Table) -> Entry:
    baseline = "dense" if row.dense else pooled.only if pooled.only in BASELINES else ""
    best = row.pipeline in table.best
    return Entry(row, pooled.cells, baseline, best, pooled.seeds, commands.of_cells(pooled.cells))


def _apart(conditions: Sequence[Conditions]) -> list[dict[str, str]]:
    """For each of several conditions what is not the same in all of them."""
    told = [spelled(one) for one in conditions]
    names = dict.fromkeys(name for one in told for name in one)
    differing = [name for name in names if len({one.get(name) for one in told}) > 1]
    return [{name: one.get(name, "") for name in differing} for one in told]


def spelled(conditions: Conditions) -> dict[str, str]:
    """Conditions as words for a reader, with each version by itself."""
    data = asdict(conditions)
    versions = {f"{name} version": str(value) for name, value in data.pop("versions").items()}
    data["limit"] = "all" if conditions.limit is None else conditions.limit
    plain = {NAMES.get(name, name.replace("_", " ")): str(value) or "none" for name, value in data.items()}
    return {**plain, **versions}


NAMES = {"identity": "weights", "limit": "questions of a task", "prompt_profile": "prompts of"}
