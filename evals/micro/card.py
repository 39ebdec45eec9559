"""`prunekit micro card`: measure a checkpoint and write its card, or only write the card anew."""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path

from prunekit_evals.micro import card_tables as tables
from prunekit_evals.micro import record
from prunekit_evals.micro.benchmark import ITEMS
from prunekit_evals.micro.card_text import HEAD, TAIL
from prunekit_evals.micro.record import Record
from prunekit_evals.run.stamp import TASKS

from prunekit.loading import model_identity


def _measured(model: Path, task: str, most: int) -> record.Measured:
    import torch
    from prunekit_evals.micro import measure

    torch.set_num_threads(1)
    rights = measure.measure(model, tasks=(task,), most=most)
    if task == TASKS[0]:
        rights["foreign"] = {"easy_vqa": measure.measure_foreign(model, most)}
    return {
        part: {t: {row: record.packed(r) for row, r in rows.items()} for t, rows in per_task.items()}
        for part, per_task in rights.items()
    }


def measured(model: Path, most: int = 500) -> record.Measured:
    """Every part on every task, two processes side by side."""
    whole: record.Measured = {}
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        for parts in pool.map(_measured, repeat(model), TASKS, repeat(most)):
            for part, per_task in parts.items():
                whole.setdefault(part, {}).update(per_task)
    return whole


def families(most: int = 500) -> dict[str, list[str]]:
    """The family of every question, in order."""
    from prunekit_evals.micro.measure import FOREIGN, foreign_items

    names = {task: [f"{q.family}/{q.category}" if task == "pope" else q.family for _, q in ITEMS[task](500)[:most]]
             for task in TASKS}  # fmt: skip
    return names | {"easy_vqa": [q.family for _, q in foreign_items(FOREIGN)[:most]]}


def _several(title: str, seeds: Sequence[str], write: tables.PerSeed, recorded: Record) -> list[str]:
    return [part for seed in seeds for part in (f"### {title}, seed {seed}", write(recorded, seed))]


def _foreign(recorded: Record) -> list[str]:
    if not all("foreign" in parts for parts in recorded.seeds.values()):
        return []
    return ["## A foreign set", tables.foreign(recorded)]


def render(recorded: Record, curve: Path) -> str:
    """The card's text."""
    seeds = list(recorded.seeds)
    parts = [
        HEAD, "## Accuracy", tables.accuracy(recorded), tables.families(recorded), *_foreign(recorded),
        "## Depth: all visual tokens removed before a layer",
        *_several("Removed before", seeds, tables.removed, recorded),
        "## Depth: layers left out", *_several("One layer", seeds, tables.skips, recorded),
        *_several("Two layers", seeds, tables.pairs, recorded),
        "## With fewer visual tokens",
        *_several("Chosen at the decoder input and before layer 2", seeds, tables.chosen, recorded),
        "## Is it the question?", *_several("16 tokens by attention", seeds, tables.control, recorded),
        "## Learning curve", tables.curve(curve), TAIL,
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def run(arguments: argparse.Namespace) -> int:
    """The command; returns its exit code."""
    model: Path = arguments.model
    file, curve = model / "measured.jsonl", model / "curve.jsonl"
    if arguments.curve:
        curve.write_text(arguments.curve.read_text())
    if not arguments.render:
        folders = {arguments.seed: model} | dict(arguments.other)
        models = {seed: str(model_identity(folder)) for seed, folder in folders.items()}
        recorded = {seed: record.earlier(file, one, arguments.questions) for seed, one in models.items()}
        seeds = {seed: recorded[seed] or measured(folder, arguments.questions) for seed, folder in folders.items()}
        record.save(file, families(arguments.questions), models, seeds)
    (model / "README.md").write_text(render(record.load(file), curve))
    print(model / "README.md")
    return 0
