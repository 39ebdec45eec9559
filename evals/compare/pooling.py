"""From cells to rows: the newest version of each pipeline, its seeds together, and which image a question is about."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import yaml
from prunekit_evals.run.results import Cell
from prunekit_evals.run.seeds import SEED, seeds

RANDOM, DOWNSAMPLE = "random", "downsample"


@dataclass(frozen=True)
class Pooled:
    """Cells of one pipeline. scores: task -> question -> score for each seed, equally many seeds on every task."""

    name: str
    cells: tuple[Cell, ...]
    scores: Mapping[str, tuple[Mapping[int, float], ...]]

    @property
    def dense(self) -> bool:
        """Whether it changes nothing."""
        return self.cells[0].pipeline.dense

    @property
    def only(self) -> str:
        """The strategy of all its stages; empty where there are several."""
        used = {str(stage.get("use")) for stage in _read(self.cells[0]).get("stages") or []}
        return used.pop() if len(used) == 1 else ""

    @property
    def random(self) -> bool:
        """Whether it only prunes at random."""
        return self.only == RANDOM

    @property
    def seeds(self) -> tuple[str, ...]:
        """The seeds that it was run with, of all its stages."""
        return tuple(dict.fromkeys(str(seed) for cell in self.cells for seed in seeds(_read(cell))))

    @property
    def flops(self) -> float | None:
        """Fraction of dense's prefill, mean over cells; None where not known."""
        return mean(cell.saved.flops_fraction for cell in self.cells if cell.saved is not None)


def unsettled(cells: Sequence[Cell]) -> list[Cell]:
    """Without failures of which there is a newer result, be it of other code or under other versions.

    cells: oldest first.
    """
    told = [(cell.pipeline.name, cell.label, repr(replace(cell.conditions, versions={}))) for cell in cells]
    done = {key: place for place, (key, cell) in enumerate(zip(told, cells, strict=True)) if cell.status == "done"}
    return [cell for place, cell in enumerate(cells) if cell.status == "done" or done.get(told[place], -1) < place]


def newest(cells: Sequence[Cell]) -> tuple[list[Cell], int]:
    """The cells that are done, of each pipeline's newest version, and how many of older versions there are.

    cells: oldest first. Two seeds are no two versions: pipelines that differ in seeds alone are all the newest.
    """
    last = {cell.pipeline.name: (family(cell), cell.pipeline.code) for cell in cells}
    current = [cell for cell in cells if (family(cell), cell.pipeline.code) == last[cell.pipeline.name]]
    return [cell for cell in current if cell.status == "done"], len(cells) - len(current)


def pooled(cells: Iterable[Cell]) -> tuple[list[Pooled], list[str]]:
    """Rows, and notes on seeds that are left out since they lack a task that another seed has.

    A row has the shortest of its pipelines' names. The last of several cells of one seed and task counts.
    """
    families: dict[tuple[str, str], dict[str, dict[str, Cell]]] = {}
    for cell in cells:
        by_seed = families.setdefault((family(cell), cell.pipeline.code), {})
        by_seed.setdefault(_nameless(cell), {})[cell.label] = cell
    rows, notes = [], []
    for by_seed in families.values():
        tasks = dict.fromkeys(task for seed in by_seed.values() for task in seed)
        whole = [seed for seed in by_seed.values() if len(seed) == len(tasks)] or [max(by_seed.values(), key=len)]
        name = min((cell.pipeline.name for seed in by_seed.values() for cell in seed.values()), key=_shortest)
        if len(whole) < len(by_seed):
            count = f"{len(by_seed) - len(whole)} of {len(by_seed)} seeds of {name}"
            notes.append(f"{count} left out, for lack of tasks that others have")
        scores = {task: tuple(seed[task].scores for seed in whole) for task in whole[0]}
        scored = {task: draws for task, draws in scores.items() if all(draws)}
        rows.append(Pooled(name, tuple(cell for seed in whole for cell in seed.values()), scored))
    return rows, notes


def images(rows: Iterable[Pooled]) -> tuple[dict[str, dict[int, str]], tuple[str, ...]]:
    """Task -> scored question -> its image, and the tasks of which questions name none; these stand for themselves."""
    found: dict[str, dict[int, str]] = {}
    asked: dict[str, set[int]] = {}
    for row in rows:
        for cell in row.cells:
            asked.setdefault(cell.label, set()).update(cell.scores)
            found.setdefault(cell.label, {}).update(cell.groups)
    without = tuple(task for task, numbers in asked.items() if numbers - found[task].keys())
    return {
        task: {number: found[task].get(number, f"#{number}") for number in sorted(numbers)}
        for task, numbers in asked.items()
    }, without


def hard(rows: Iterable[Pooled]) -> dict[str, frozenset[int]]:
    """Task -> the questions that a row gets wrong which shows smaller images and does nothing else."""
    wrong: dict[str, set[int]] = {}
    for row in rows:
        for task, draws in row.scores.items() if row.only == DOWNSAMPLE else ():
            missed = (number for one in draws for number, score in one.items() if score < 0.5)
            wrong.setdefault(task, set()).update(missed)
    return {task: frozenset(numbers) for task, numbers in wrong.items() if numbers}


def family(cell: Cell) -> str:
    """What pipelines that differ in seeds alone have in common.

    Without a seed among its options that is the pipeline itself.
    """
    return _unseeded_text(cell.pipeline.resolved) or cell.pipeline.sha


def mean(values: Iterable[float | None]) -> float | None:
    """Of the values that are known; None without any."""
    measured = [value for value in values if value is not None]
    return statistics.fmean(measured) if measured else None


def _nameless(cell: Cell) -> str:
    return json.dumps(_bare(_read(cell)), default=str)


def _bare(data: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is only said about it."""
    return {key: value for key, value in data.items() if key not in ("name", "description")}


def _shortest(name: str) -> tuple[int, str]:
    return len(name), name


def _read(cell: Cell) -> Mapping[str, Any]:
    return _parsed(cell.pipeline.resolved)


@cache
def _unseeded_text(resolved: str) -> str:
    """A pipeline without its seeds and what is only said about it; empty for one that has none."""
    data = _parsed(resolved)
    return json.dumps(_unseeded(_bare(data)), default=str) if _seeded(data) else ""


@cache
def _parsed(resolved: str) -> Mapping[str, Any]:
    data = yaml.safe_load(resolved)
    return data if isinstance(data, dict) else {}


def _seeded(data: Any) -> bool:
    return any(True for _ in seeds(data))


def _unseeded(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {key: _unseeded(value) for key, value in data.items() if key != SEED}
    return [_unseeded(one) for one in data] if isinstance(data, list) else data
