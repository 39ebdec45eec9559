"""Comparison tables for a terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from prunekit_evals.compare.judging import Comparison
from prunekit_evals.compare.stats import Estimate
from prunekit_evals.compare.tables import Row, Table

if TYPE_CHECKING:
    from rich.console import Console

SHORT = {"mmbench_en_dev_static": "mmbench", "scienceqa_img": "scienceqa", "textvqa_val": "textvqa"}
LEGEND = (
    "Accuracy in %, ± half of its 95 % interval, which draws images anew and not questions. Δ dense, Δ random: paired "
    "difference to dense and to random at the same FLOPs, * where it holds after correction. Hard: accuracy on the "
    "questions that downsampling gets wrong. Tokens: visual "
    "tokens left after the last stage. FLOPs, KV: of the language model's prefill, % of dense. Whole: FLOPs of the "
    "whole prefill, with vision tower and projector. Time: of the same, over dense's, measured alternately."
)


def columns(table: Table, intervals: bool = True) -> dict[str, list[str]]:
    """Column name to its texts, one for each row; columns that say nothing are left out.

    intervals: whether each task shows its own.
    """
    rows = table.rows
    filled = {
        "Pipeline": [row.pipeline for row in rows],
        **{short(label): [_estimate(row.tasks.get(label), intervals) for row in rows] for label in table.tasks},
        "Average": [_estimate(row.average, True) for row in rows],
        "Δ dense": [_difference(row.to_dense) for row in rows],
        "Δ random": [_difference(row.to_random) for row in rows],
        "Hard": [_hard(row) for row in rows],
        "Seeds": [_seeds(row) for row in rows],
        "Tokens": ["" if row.kept_tokens is None else f"{row.kept_tokens:.4g}" for row in rows],
        "FLOPs": [_percent(row.flops_fraction) for row in rows],
        "Whole": [_percent(row.whole_flops_fraction) for row in rows],
        "KV": [_percent(row.kv_fraction) for row in rows],
        **{_clock(table, machine): [_time(row, machine) for row in rows] for machine in table.machines},
    }
    return {name: texts for name, texts in filled.items() if any(texts)}


def show(table: Table, console: Console) -> None:
    """Print a table; a narrow terminal gets fewer columns rather than broken ones."""
    from rich import box
    from rich.table import Table as Grid
    from rich.text import Text

    grid = Grid(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, title_justify="left", title_style="bold")
    grid.title = table.conditions.title()
    shown, hidden = _fitting(table, console.width)
    for place, name in enumerate(shown):
        # `micro/` on a line of its own keeps the columns as narrow as their numbers.
        grid.add_column(name.replace("/", "/\n"), justify="right" if place else "left", no_wrap=True, vertical="bottom")
    for row, texts in zip(table.rows, zip(*shown.values(), strict=True), strict=True):
        cells = dict(zip(shown, map(Text, texts), strict=True))
        for name, change in (("Δ dense", row.to_dense), ("Δ random", row.to_random)):
            if name in cells and change is not None and change.holds:
                cells[name].stylize("green" if change.holds > 0 else "red")
        grid.add_row(*cells.values(), style="bold" if row.dense else "", end_section=row.dense)
    console.print(grid)
    for line in table.verdicts:
        console.print(Text(line))
    for note in table.notes:
        console.print(Text(f"note: {note}", style="yellow"))
    if hidden:
        console.print(Text(f"hidden, for lack of width: {', '.join(hidden)} (--markdown has all)", style="yellow"))
    console.print(Text(_labels(table.tasks) + LEGEND, style="dim"))


def markdown(table: Table) -> str:
    """The table as Markdown, with its conditions, notes and legend."""
    out = [f"**{_plain(table.conditions.title())}**", "", grid(table)]
    out += ["", *(f"{_plain(line[0].upper() + line[1:])}.  " for line in table.verdicts)]
    out += [f"Note: {_plain(note)}.  " for note in table.notes]
    return "\n".join([*out, f"_{_labels(table.tasks)}{LEGEND}_", ""])


def grid(table: Table) -> str:
    """The rows alone, as Markdown."""
    shown = columns(table)
    lines = [_joined(list(shown)), _joined(["---", *["---:"] * (len(shown) - 1)])]
    return "\n".join([*lines, *(_joined(texts) for texts in zip(*shown.values(), strict=True))])


def _fitting(table: Table, width: int) -> tuple[dict[str, list[str]], list[str]]:
    """The columns that fit, and the names of what does not: Whole, Hard and Seeds go, tasks lose their intervals, then
    KV goes, then the tasks.

    Markdown and JSON have all of them.
    """
    tasks = {short(label) for label in table.tasks}
    some = {"Hard", "Whole", "Seeds"}
    few = {*tasks, *some, "KV", "Tokens"}
    steps: tuple[tuple[bool, set[str]], ...] = (
        (True, set()), (True, {"Whole"}), (True, {"Whole", "Hard"}), (True, some), (False, some),
        (False, {*some, "KV"}), (False, {*tasks, "Hard", "Seeds"}), (False, few), (False, {*few, "Δ random"}),
    )  # fmt: skip
    shown, hidden, everything = {}, [], columns(table)
    for intervals, without in steps:
        shown = {name: texts for name, texts in columns(table, intervals).items() if name not in without}
        hidden = [name for name in everything if name not in shown]
        if not intervals and tasks & shown.keys():
            hidden.append("intervals of tasks")
        if _width(shown) <= width:
            break
    return shown, hidden


def _width(shown: dict[str, list[str]]) -> int:
    heads = {name: max(map(len, name.replace("/", "/\n").split("\n"))) for name in shown}
    return sum(max([heads[name], *map(len, texts)]) + 2 for name, texts in shown.items()) + 1


def _labels(labels: Sequence[str]) -> str:
    if not any(label.startswith("micro/") for label in labels):
        return ""
    return "micro/…: the bundled benchmark in the standard task's schema, not the benchmark of that name. "


def _joined(texts: Sequence[str]) -> str:
    return "| " + " | ".join(_plain(text).replace("|", "\\|") for text in texts) + " |"


def _plain(text: str) -> str:
    """No markup: names and errors come from files."""
    return text.replace("<", "&lt;").replace("\n", " ")


def short(label: str) -> str:
    """The head of a task's column."""
    prefix, slash, name = label.rpartition("/")
    return prefix + slash + SHORT.get(name, name)


def _estimate(estimate: Estimate | None, interval: bool) -> str:
    if estimate is None:
        return "–"
    return f"{100 * estimate.value:.1f}" + (f" ±{100 * estimate.half:.1f}" if interval else "")


def _difference(compared: Comparison | None) -> str:
    if compared is None:
        return ""
    holds = "*" if compared.holds else ""
    return f"{_signed(100 * compared.difference.value)} ±{100 * compared.difference.half:.1f}{holds}"


def _seeds(row: Row) -> str:
    """How many, and between which averages they lie."""
    return f"{len(row.seeds)}: {100 * min(row.seeds):.1f}–{100 * max(row.seeds):.1f}" if row.seeds else ""


def _hard(row: Row) -> str:
    return "" if row.hard is None else _estimate(row.hard, True)


def _signed(value: float) -> str:
    text = f"{value:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")


def _clock(table: Table, machine: str) -> str:
    """The head of a machine's times, which are in no column with another's."""
    return "Time" if len(table.machines) == 1 else f"Time {table.machines.index(machine) + 1}"


def _time(row: Row, machine: str) -> str:
    if row.dense:
        return "1×"  # by definition: it is what the others are measured against
    return f"{row.times[machine]:.2f}×" if machine in row.times else ""


def _percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{100 * fraction:.0f}%"
