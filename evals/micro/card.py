"""Measure the shipped checkpoint and write its card: ``python -m prunekit_evals.micro.card``."""

import argparse
import json
import multiprocessing
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path

import numpy as np

from . import model_path
from .benchmark import TASKS
from .card_text import HEAD, TAIL
from .measure import measure, wilson
from .packing import OPEN_SHARES

Row = dict[str, dict[str, list[bool]]]  # task -> family -> right or wrong
CHANCE = {"pope": 50, "mme": 50, "gqa": None, "mmbench_en_dev_static": 25, "scienceqa_img": 25}


def _all(families: dict[str, list[bool]]) -> list[bool]:
    return [ok for rights in families.values() for ok in rights]


def _share(rights: list[bool]) -> str:
    low, high = wilson(sum(rights), len(rights))
    return f"{100 * np.mean(rights):.1f} ({100 * low:.1f} to {100 * high:.1f})"


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(header)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def accuracy_table(dense: Row, blind: Row) -> str:
    """One line a task: dense with its interval, blind, chance."""
    rows = []
    for task in dense:
        chance = CHANCE[task]
        rows.append([
            f"`{task}`", str(len(_all(dense[task]))), _share(_all(dense[task])), _share(_all(blind[task])),
            "-" if chance is None else str(chance),
        ])  # fmt: skip
    return _table(("task", "questions", "accuracy % (95 % interval)", "blind", "chance"), rows)


def family_table(dense: Row, blind: Row) -> str:
    rows = [
        [f"`{task}`", family, str(len(rights)), _share(rights), f"{100 * np.mean(blind[task][family]):.1f}"]
        for task, families in dense.items()
        for family, rights in families.items()
    ]
    return _table(("task", "family", "questions", "accuracy %", "blind"), rows)


def keep_table(table: dict[str, Row]) -> str:
    """One line a row of the measurement: the mean over tasks, then every task."""
    tasks = list(table["dense"])
    rows = []
    for name, row in table.items():
        scores = [100 * float(np.mean(_all(row[task]))) for task in tasks]
        rows.append([name, f"{np.mean(scores):.1f}", *(f"{s:.1f}" for s in scores)])
    return _table(("visual tokens", "mean", *(f"`{t}`" for t in tasks)), rows)


def curve_table(curve: Path) -> str:
    """Held-out accuracy of the watched families as stage 2 went on."""
    lines = [json.loads(line) for line in curve.read_text().splitlines()]
    read = [line for line in lines if line["stage"] == "read" and "existence" in line]
    names = [*OPEN_SHARES, "choice_existence", "hint_color", "keep11", "blind"]
    rows = [[str(line["step"]), f"{line['loss']:.3f}", *_percent(line, names)] for line in _thinned(read)]
    return _table(("step", "loss", *names), rows)


def _percent(line: dict, names: Iterable[str]) -> list[str]:
    return [f"{100 * line[n]:.0f}" for n in names]


def _thinned(lines: list[dict], most: int = 12) -> list[dict]:
    """At most so many lines, the last one among them."""
    every = -(-len(lines) // most)
    return lines[len(lines) - 1 :: -every][::-1] if lines else []


def summary(table: dict[str, Row]) -> dict:
    """Right and asked, by row, task and family: what the tables are made of."""
    return {
        name: {t: {f: [int(sum(r)), len(r)] for f, r in families.items()} for t, families in row.items()}
        for name, row in table.items()
    }


def _measured(model: Path, task: str, questions: int) -> tuple[dict[str, Row], dict[str, Row]]:
    import torch

    torch.set_num_threads(1)
    few = measure(model, questions // 4, keeps=(), tasks=(task,))
    return measure(model, questions, tasks=(task,), removals=()), few


def measured(model: Path, questions: int) -> tuple[dict[str, Row], dict[str, Row]]:
    """Rows with chosen tokens, and rows with all tokens removed before a layer; one task a process at a time."""
    tables: tuple[dict[str, Row], dict[str, Row]] = {}, {}
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        for parts in pool.map(_measured, repeat(model), TASKS, repeat(questions)):
            for table, part in zip(tables, parts, strict=True):
                for name, row in part.items():
                    table.setdefault(name, {}).update(row)
    return tables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=model_path())
    parser.add_argument("--curve", type=Path, default=None, help="learning curve of the run, to be copied in")
    parser.add_argument("--questions", type=int, default=600)
    args = parser.parse_args()
    if args.curve:
        (args.model / "curve.jsonl").write_text(args.curve.read_text())
    table, removed = measured(args.model, args.questions)
    (args.model / "measured.json").write_text(json.dumps({**summary(removed), **summary(table)}) + "\n")
    dense, blind = table["dense"], table["blind"]
    parts = [
        HEAD, "## Accuracy", accuracy_table(dense, blind), family_table(dense, blind),
        "## With fewer visual tokens", keep_table(table),
        f"## All visual tokens removed before a layer (the first {args.questions // 4} questions of a task)",
        keep_table(removed),
        "## Learning curve", curve_table(args.model / "curve.jsonl"), TAIL,
    ]  # fmt: skip
    (args.model / "README.md").write_text("\n\n".join(parts) + "\n")
    print(keep_table(table), keep_table(removed), sep="\n\n")


if __name__ == "__main__":
    main()
