"""Questions that are named one by one, of each task by their numbers: those that a search holds out, say."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from prunekit_evals.run.results import Cell

from prunekit.errors import InputError

Rows = Mapping[str, Sequence[int]]  # task -> numbers of its questions in the data, in the order in which they are asked
SHAPE = 'a JSON mapping of tasks to numbers of questions, such as {"pope": [3, 17]}'


def mark(rows: Rows) -> str:
    """12 hex digits that tell these questions from others."""
    listed = {task: list(numbers) for task, numbers in rows.items()}
    return hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()[:12]


def text(rows: Rows) -> str:
    """The file that `read` reads, a line for each task."""
    lines = [f"{json.dumps(task)}: {json.dumps(list(numbers))}" for task, numbers in rows.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def read(path: Path, tasks: Iterable[str]) -> Rows:
    """The questions of a file. Raises InputError for another file, and for one that lacks one of these tasks."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"--questions {path}: {error} (it is {SHAPE})") from error
    sound = isinstance(data, dict) and all(
        isinstance(numbers, list) and numbers and all(type(one) is int and one >= 0 for one in numbers)
        and len(set(numbers)) == len(numbers)
        for numbers in data.values()
    )  # fmt: skip
    if not sound:
        raise InputError(f"--questions {path}: is not {SHAPE}, each number once")
    if missing := [task for task in tasks if task not in data]:
        raise InputError(f"--questions {path}: names no questions of {', '.join(missing)}")
    return {task: tuple(numbers) for task, numbers in data.items()}


def recorded(cells: Iterable[Cell]) -> Rows:
    """By task the questions that cells have answered, in the order in which they were asked."""
    return {cell.task: tuple(one.number for one in cell.questions) for cell in cells}
