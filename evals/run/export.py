"""Results as plain rows for other programs: a row for each cell, or for each question."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from statistics import fmean
from typing import Any

from prunekit_evals.run.results import Cell

Row = dict[str, Any]


def of_cells(cells: Iterable[Cell]) -> list[Row]:
    """A row for each cell: all that its file holds, under the names that it has there, with dots between levels.

    First come the counts of its questions and `accuracy`, the mean of their scores; None without any.
    """
    return [_cell(cell) for cell in cells]


def of_questions(cells: Iterable[Cell]) -> list[Row]:
    """A row for each question, behind what tells its cell from others."""
    return [
        {"cell": cell.id, "model": cell.conditions.model, "task": cell.label, "pipeline": cell.pipeline.name,
         "pipeline_sha": cell.pipeline.sha, "seeds": list(cell.pipeline.seeds), **_texts(asdict(question))}
        for cell in cells
        for question in cell.questions
    ]  # fmt: skip


def _cell(cell: Cell) -> Row:
    data = asdict(cell)
    del data["questions"]
    scores = cell.scores
    counts = {
        "accuracy": fmean(scores.values()) if scores else None, "questions": len(cell.questions),
        "scored": len(scores), "unanswered": len(cell.unanswered), "images": len(set(cell.groups.values())),
    }  # fmt: skip
    return {**counts, **_texts(dict(_flat(data)))}


def _flat(data: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in data.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{name}.")
        else:
            yield above + name, list(value) if isinstance(value, tuple) else value


def _texts(row: Row) -> Row:
    """With what is no text in any encoding, as half of a surrogate pair, escaped."""
    return {
        name: value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value
        for name, value in row.items()
    }
