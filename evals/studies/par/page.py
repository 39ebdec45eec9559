"""The text of a study of PAR, from the cells of its sweeps: tables of `prunekit compare`, one for each budget, and PAR
against each other row of it, paired by image and corrected."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from prunekit_evals.compare import judging, pooling, rendering, tables
from prunekit_evals.compare.judging import Comparison, Contender
from prunekit_evals.compare.pooling import Pooled
from prunekit_evals.compare.tables import Table
from prunekit_evals.run.results import Cell

MAIN = "PAR"  # how the names begin of the rows that are compared with all others
BUDGET = re.compile(r"-flops-([0-9.]+)$")
COUNTED = re.compile(r"-\d+$")  # of rows of one kind that differ in how many layers they change: static-3, static-4


@dataclass(frozen=True)
class Block:
    """A part of a page between two markers, `<!-- par-micro -->` and `<!-- /par-micro -->`."""

    name: str

    def into(self, page: str, text: str) -> str:
        """The page with this text. Raises ValueError for one without the markers."""
        begin, end = f"<!-- {self.name} -->", f"<!-- /{self.name} -->"
        before, found, rest = page.partition(begin)
        _, ended, after = rest.partition(end)
        if not (found and ended):
            raise ValueError(f"the page has no '{begin} ... {end}'")
        return f"{before}{begin}\n\n{text}\n\n{end}{after}"


def section(title: str, cells: Sequence[Cell]) -> str:
    """One sweep, or several over one folder. Raises ValueError for cells of several conditions, or that failed."""
    made = tables.of_cells(cells)
    if len(made) != 1:
        raise ValueError(f"{title}: results of {len(made)} sets of conditions in one folder (delete the older ones)")
    if failed := [cell for cell in cells if cell.status == "failed"]:
        raise ValueError(f"{title}: {failed[0].pipeline.name} on {failed[0].label} failed: {failed[0].error}")
    (table,) = made
    rows = {row.name: row for row in pooling.pooled(pooling.newest(sorted(cells, key=_age))[0])[0]}
    parts = [f"### {title}", _conditions(table)]
    for budget in budgets(rows):
        parts += _at(budget, rows, table)
    others = [name for name in rows if BUDGET.search(name) is None]
    shown = [name for name in others if name.startswith(MAIN)] if budgets(rows) else others
    if shown:
        parts += [f"#### {MAIN} at T tokens and L layers"] if budgets(rows) else []
        parts.append(_table(table, [*_dense(rows), *shown]))
    return "\n\n".join(parts)


def budgets(rows: dict[str, Pooled]) -> list[float]:
    """The budgets that rows are named by, the largest first."""
    return sorted({float(found[1]) for name in rows if (found := BUDGET.search(name))}, reverse=True)


def at_budget(budget: float, rows: dict[str, Pooled]) -> list[str]:
    """The rows that stand beside each other at a budget: those solved to it, and of each kind of rows that cannot be
    solved, such as `static-3` and `static-4`, the cheapest one that costs at least as much.
    """
    solved = [name for name in rows if (found := BUDGET.search(name)) and float(found[1]) == budget]
    kinds: dict[str, list[str]] = {}
    for name, row in rows.items():
        enough = row.flops is not None and row.flops >= budget - judging.NEAR and not row.dense
        if BUDGET.search(name) is None and not name.startswith(MAIN) and enough:
            kinds.setdefault(COUNTED.sub("", name), []).append(name)
    return [*solved, *(min(names, key=lambda name: rows[name].flops or 1.0) for names in kinds.values())]


def _at(budget: float, rows: dict[str, Pooled], table: Table) -> Iterator[str]:
    names = [*_dense(rows), *at_budget(budget, rows)]
    yield f"#### {100 * budget:g} % of dense's FLOPs"
    yield _table(table, names)
    contenders = {name: Contender(name, one.dense, one.random, one.flops, one.scores) for name in names
                  if (one := rows[name])}  # fmt: skip
    images, _ = pooling.images(rows.values())
    for name in names:
        if name.startswith(MAIN):
            others = tuple(one for other, one in contenders.items() if other != name)
            yield _against(name, judging.against(contenders[name], others, table.shared, images))


def _against(name: str, compared: Sequence[Comparison]) -> str:
    words = {1: "beats", 0: "is not told apart from", -1: "is beaten by"}
    told = [
        f"{words[holds]} {', '.join(f'`{one.other}`' for one in compared if one.holds == holds)}"
        for holds in words
        if any(one.holds == holds for one in compared)
    ]
    head = f"| `{name}` minus | points | images won | lost | p |\n| --- | --- | --- | --- | --- |"
    ordered = sorted(compared, key=lambda one: -one.difference.value)
    return f"**`{name}`** {'; it '.join(told)}.\n\n" + "\n".join([head, *map(_line, ordered)])


def _line(one: Comparison) -> str:
    value, low, high = (100 * number for number in (one.difference.value, one.difference.low, one.difference.high))
    points = f"{value:+.1f} ({low:+.1f} to {high:+.1f})"
    return f"| {one.other} | {points} | {one.wins} | {one.losses} | {one.corrected:.2g} |"


def _table(table: Table, names: Sequence[str]) -> str:
    """These rows of a table, the best first. Verdicts and notes are of the whole, and left out."""
    rows = [row for row in table.rows if row.pipeline in names]
    ordered = sorted(rows, key=lambda row: (not row.dense, -(row.average.value if row.average else 0.0)))
    return rendering.grid(replace(table, rows=tuple(ordered)))


def _conditions(table: Table) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in table.conditions.versions.items())
    images = ", ".join(f"{label.rpartition('/')[2]} {count}" for label, count in table.images.items())
    return (
        f"{table.conditions.title()}; {versions}. Images: {images}. Intervals are of 95 % and draw images anew; "
        f"p is of McNemar's exact test on images, corrected by Holm over the comparisons of its table."
    )


def _dense(rows: dict[str, Pooled]) -> list[str]:
    return [name for name, row in rows.items() if row.dense]


def _age(cell: Cell) -> str:
    return cell.created
