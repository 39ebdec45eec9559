"""From results folders to sound cells; what is none is left out by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import yaml
from prunekit_evals.run import results
from prunekit_evals.run.annotated import check
from prunekit_evals.run.results import CELL_FILE, Cell

from prunekit.errors import InputError

OTHERS = (".journal.jsonl", ".lock")  # what a run leaves beside its cells, as it does folders `data` and `*.files`


@dataclass(frozen=True)
class Skipped:
    """A file that is left out, and why."""

    path: Path
    why: str

    def __str__(self) -> str:
        return f"{self.path}: {self.why}"


@dataclass(frozen=True)
class Found:
    """What lies in results folders: cells, of several with one identity the newest, and what was left out."""

    cells: tuple[Cell, ...]
    skipped: tuple[Skipped, ...]


def read(sources: Sequence[Path]) -> Found:
    """All cells under these folders; a source may also be one cell's file.

    Raises InputError for a source that is not there.
    """
    for source in sources:
        if not source.exists():
            raise InputError(f"no results folder '{source}' (make one with `prunekit eval`, or name another)")
    cells: dict[str, Cell] = {}
    skipped = []
    for path in dict.fromkeys(path for source in sources for path in _files(source)):
        try:
            cell = _sound(results.read(path))
        except InputError as error:
            skipped.append(Skipped(path, str(error).removeprefix(f"'{path}' is ")))
            continue
        except RecursionError:
            skipped.append(Skipped(path, "nested too deeply"))
            continue
        if cell.id not in cells or cells[cell.id].created <= cell.created:
            cells[cell.id] = cell
    foreign = [Skipped(path, "no result of `prunekit eval`") for source in sources for path in _foreign(source)]
    return Found(tuple(cells.values()), tuple(dict.fromkeys([*skipped, *foreign])))


def _files(source: Path) -> Iterator[Path]:
    """What should be cells."""
    if source.is_file():
        yield source
    else:
        yield from (path for path in sorted(source.rglob("*.json")) if CELL_FILE.search(path.name) and path.is_file())


def _foreign(source: Path) -> Iterator[Path]:
    """Other files: neither hidden, nor what a run leaves beside cells."""
    if source.is_file():
        return
    for path in sorted(source.rglob("*")):
        parts = path.relative_to(source).parts
        beside = "data" in parts[:-1] or any(part.endswith(".files") for part in parts) or path.name.endswith(OTHERS)
        hidden = any(part.startswith(".") for part in parts)
        if not (beside or hidden or CELL_FILE.search(path.name)) and path.is_file():
            yield path


def _sound(cell: Cell) -> Cell:
    """The cell. Raises InputError where it holds what `prunekit eval` does not write."""
    # Metrics of other code are shown and not computed with: they alone may be NaN.
    metrics = cell.metrics
    if isinstance(metrics, dict):
        metrics = {name: 0.0 if value != value else value for name, value in metrics.items()}
    if wrong := check(Cell)(replace(cell, metrics=metrics)):
        raise InputError(f"a damaged cell: {wrong.removeprefix('.')}")
    for question in cell.questions:
        if question.score is not None and not 0 <= question.score <= 1:
            raise InputError(f"a damaged cell: question {question.number} has score {question.score}, not in [0, 1]")
    if wrong := _pipeline(cell.pipeline.resolved):
        raise InputError(f"a damaged cell: pipeline.resolved {wrong}")
    return cell


@cache
def _pipeline(text: str) -> str:
    """What is wrong with a pipeline in full; empty for a sound one. It has no anchors, which may explode."""
    try:
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
            return "has anchors"
        data = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        return f"is no YAML: {' '.join(str(error).split())[:200]}"
    stages = data.get("stages") or [] if isinstance(data, dict) else None
    if not isinstance(stages, list) or not all(isinstance(stage, dict) for stage in stages):
        return "is no pipeline"
    return ""
