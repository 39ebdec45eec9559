"""Measure the shipped checkpoint and write its card: ``python -m prunekit_evals.micro.card``."""

import argparse
import json
import multiprocessing
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path

from . import model_path
from .benchmark import TASKS
from .card_text import HEAD, TAIL
from .measure import measure, wilson
from .packing import OPEN_SHARES

KEEPS = (0.25, 0.11, 0.06)
Row = dict[str, dict[str, list[int]]]  # task -> family -> [right, asked]
CHANCE = {"pope": 50, "mme": 50, "gqa": None, "mmbench_en_dev_static": 25, "scienceqa_img": 25}


def _all(families: dict[str, list[int]]) -> tuple[int, int]:
    right, asked = map(sum, zip(*families.values(), strict=True))
    return right, asked


def _percent(right: int, asked: int) -> str:
    return f"{100 * right / asked:.1f}"


def _share(right: int, asked: int) -> str:
    low, high = wilson(right, asked)
    return f"{_percent(right, asked)} ({100 * low:.1f} to {100 * high:.1f})"


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(header)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def accuracy_table(dense: Row, blind: Row) -> str:
    """One line a task: dense with its interval, blind, chance."""
    rows = [
        [f"`{task}`", str(_all(dense[task])[1]), _share(*_all(dense[task])), _share(*_all(blind[task])),
         str(CHANCE[task] or "-")]
        for task in dense
    ]  # fmt: skip
    return _table(("task", "questions", "accuracy % (95 % interval)", "blind", "chance"), rows)


def family_table(dense: Row, blind: Row) -> str:
    """The same by family of questions."""
    rows = [
        [f"`{task}`", family, str(counts[1]), _share(*counts), _percent(*blind[task][family])]
        for task, families in dense.items()
        for family, counts in families.items()
    ]
    return _table(("task", "family", "questions", "accuracy %", "blind"), rows)


def keep_table(table: dict[str, Row]) -> str:
    """One line a row of the measurement: the mean over tasks, then every task."""
    tasks = list(table["dense"])
    rows = []
    for name, row in table.items():
        counts = [_all(row[task]) for task in tasks]
        mean = sum(right / asked for right, asked in counts) / len(counts)
        rows.append([name, f"{100 * mean:.1f}", *(_percent(*c) for c in counts)])
    return _table(("visual tokens", "mean", *(f"`{t}`" for t in tasks)), rows)


def curve_table(curve: Path) -> str:
    """Held-out accuracy of the watched families as stage 2 went on."""
    lines = [json.loads(line) for line in curve.read_text().splitlines()]
    read = [line for line in lines if line["stage"] == "read" and "existence" in line]
    names = [*OPEN_SHARES, "choice_existence", "hint_color", "keep11", "blind"]
    rows = [[str(line["step"]), f"{line['loss']:.3f}", *_shares(line, names)] for line in _thinned(read)]
    return _table(("step", "loss", *names), rows)


def _shares(line: dict, names: Iterable[str]) -> list[str]:
    return [f"{100 * line[n]:.0f}" for n in names]


def _thinned(lines: list[dict], most: int = 12) -> list[dict]:
    """At most so many lines, the last one among them."""
    every = -(-len(lines) // most)
    return lines[len(lines) - 1 :: -every][::-1] if lines else []


def _counts(row: dict[str, dict[str, list[bool]]]) -> Row:
    return {t: {f: [sum(r), len(r)] for f, r in families.items()} for t, families in row.items()}


def _measured(model: Path, task: str, questions: int) -> dict[str, dict[str, Row]]:
    import torch

    torch.set_num_threads(1)
    chosen = measure(model, questions, keeps=KEEPS, tasks=(task,), removals=())
    removed = measure(model, questions // 4, keeps=(), tasks=(task,))
    named = {"chosen": chosen, "removed": removed}
    return {part: {name: _counts(row) for name, row in table.items()} for part, table in named.items()}


def measured(model: Path, questions: int) -> dict[str, dict[str, Row]]:
    """``{"chosen": rows, "removed": rows}``: tokens chosen at the door, and all removed before a layer.

    The second is measured on the first quarter of each task's questions.
    """
    tables: dict[str, dict[str, Row]] = {"chosen": {}, "removed": {}}
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        for parts in pool.map(_measured, repeat(model), TASKS, repeat(questions)):
            for part, rows in parts.items():
                for name, row in rows.items():
                    tables[part].setdefault(name, {}).update(row)
    return tables


def render(tables: dict[str, dict[str, Row]], curve: Path) -> str:
    """The card's text."""
    chosen, removed = tables["chosen"], tables["removed"]
    dense, blind = chosen["dense"], chosen["blind"]
    few = sum(asked for _, asked in removed["dense"]["pope"].values())
    parts = [
        HEAD, "## Accuracy", accuracy_table(dense, blind), family_table(dense, blind),
        "## With fewer visual tokens", keep_table(chosen),
        f"## All visual tokens removed before a layer (the first {few} questions of a task)", keep_table(removed),
        "## Learning curve", curve_table(curve), TAIL,
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=model_path())
    parser.add_argument("--curve", type=Path, default=None, help="learning curve of the run, to be copied in")
    parser.add_argument("--questions", type=int, default=600)
    parser.add_argument("--render", action="store_true", help="only write the text anew, from what was measured")
    args = parser.parse_args()
    curve, record = args.model / "curve.jsonl", args.model / "measured.json"
    if args.curve:
        curve.write_text(args.curve.read_text())
    if not args.render:
        record.write_text(json.dumps(measured(args.model, args.questions)) + "\n")
    (args.model / "README.md").write_text(render(json.loads(record.read_text()), curve))


if __name__ == "__main__":
    main()
