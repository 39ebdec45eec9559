"""What the plots show: accuracy against a cost, of each row, on the average and on each task; and the Pareto front."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from prunekit_evals.compare.stats import Estimate
from prunekit_evals.leaderboard.board import Entry, Section

AVERAGE = "average"
OTHER = "method"
NAME = (0.3, 0.06)  # the room that a name takes, as shares of a plot's width and height


@dataclass(frozen=True)
class Axis:
    """A cost of a plot. key: its name in the data; machine: of which the times are, None for FLOPs."""

    key: str
    title: str
    machine: str | None = None


def axes(section: Section) -> tuple[Axis, ...]:
    """FLOPs, and the times of each machine by themselves."""
    whole = all(entry.row.whole_flops_fraction is not None for entry in section.entries)
    of = "the whole prefill" if whole else "the language model's prefill"
    flops = Axis("flops", f"FLOPs of {of}, % of dense")
    machines = enumerate(section.table.machines)
    times = (Axis(f"time{number}", f"prefill time, % of dense{_on(machine)}", machine) for number, machine in machines)
    return (flops, *times)


def views(section: Section) -> tuple[str, ...]:
    """What a plot can show: the average, where there is one, and each task."""
    averaged = any(entry.row.average for entry in section.entries)
    return (*((AVERAGE,) if averaged else ()), *section.table.tasks)


def of_section(section: Section) -> list[dict[str, Any]]:
    """Plain data: a point for each row and view. Percentages; a cost that is not known is missing."""
    shown = axes(section)
    points = []
    for view in views(section):
        of_view = [point for entry in section.entries if (point := _point(entry, view, shown)) is not None]
        for axis in shown:
            of_axis = {id(point): (point[axis.key], point["accuracy"]) for point in of_view if axis.key in point}
            ahead = front(of_axis.values())
            named = apart(ahead, of_axis.values())
            for point in of_view:
                point[f"{axis.key}_front"] = of_axis.get(id(point)) in ahead
                point[f"{axis.key}_name"] = of_axis.get(id(point)) in named
                named.discard(of_axis.get(id(point), (0.0, 0.0)))  # of equal points the first
        points += of_view
    return points


def front(points: Iterable[tuple[float, float]]) -> set[tuple[float, float]]:
    """Of (cost, accuracy) those that none at its cost or below is as accurate as."""
    best, ahead = float("-inf"), set()
    for cost, accuracy in sorted(points, key=lambda point: (point[0], -point[1])):
        if accuracy > best:
            best = accuracy
            ahead.add((cost, accuracy))
    return ahead


def apart(ahead: Iterable[tuple[float, float]], shown: Iterable[tuple[float, float]]) -> set[tuple[float, float]]:
    """Of the front those whose names can stand in a plot of `shown` without covering each other, the best first."""
    costs, accuracies = zip(*(list(shown) or [(0.0, 0.0)]), strict=True)
    wide, high = NAME[0] * (max(costs) - min(costs)), NAME[1] * (max(accuracies) - min(accuracies))
    named: set[tuple[float, float]] = set()
    for cost, accuracy in sorted(ahead, key=lambda point: -point[1]):
        if all(abs(cost - x) >= wide or abs(accuracy - y) >= high for x, y in named):
            named.add((cost, accuracy))
    return named


def _point(entry: Entry, view: str, shown: Sequence[Axis]) -> dict[str, Any] | None:
    row = entry.row
    estimate: Estimate | None = row.average if view == AVERAGE else row.tasks.get(view)
    if estimate is None:
        return None
    point: dict[str, Any] = {
        "pipeline": row.pipeline, "view": view, "kind": entry.baseline or OTHER, "accuracy": _percent(estimate.value),
        "low": _percent(estimate.low), "high": _percent(estimate.high),
    }  # fmt: skip
    for axis in shown:
        point |= _flops(entry, axis) if axis.machine is None else _time(entry, axis)
    return point


def _flops(entry: Entry, axis: Axis) -> dict[str, float]:
    row = entry.row
    whole = axis.title.startswith("FLOPs of the whole")
    fraction = row.whole_flops_fraction if whole else row.flops_fraction
    return {} if fraction is None else {axis.key: _percent(fraction)}


def _time(entry: Entry, axis: Axis) -> dict[str, float]:
    """The mean over tasks, and between which tasks it lies."""
    if entry.row.dense:
        return {axis.key: 100.0}  # by definition
    timed = [cell.timing for cell in entry.cells if cell.timing is not None and cell.timing.machine == axis.machine]
    ratios = [one.prefill_ratio for one in timed if one.prefill_ratio is not None]
    if not ratios:
        return {}
    ends = {f"{axis.key}_low": _percent(min(ratios)), f"{axis.key}_high": _percent(max(ratios))}
    return {axis.key: _percent(entry.row.times[str(axis.machine)]), **ends}


def _on(machine: str) -> str:
    return f", on {machine}" if machine else ""


def _percent(fraction: float) -> float:
    return round(100 * fraction, 2)
