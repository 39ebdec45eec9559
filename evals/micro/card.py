"""`prunekit micro card`: measure a checkpoint and write its card, or only write the card anew."""

import argparse
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path

from prunekit_evals.micro import card_tables as tables
from prunekit_evals.micro import record
from prunekit_evals.micro.benchmark import ITEMS, TASKS
from prunekit_evals.micro.card_text import HEAD, TAIL
from prunekit_evals.micro.record import Record
from prunekit_evals.run.identity import model_identity


def _measured(model: Path, task: str, most: int) -> record.Measured:
    import torch
    from prunekit_evals.micro import measure

    torch.set_num_threads(1)
    found = measure.measure(model, tasks=(task,), most=most)
    if task == TASKS[0]:
        found["foreign"] = {"easy_vqa": measure.measure_foreign(model, most)}
    return {
        part: {t: {row: record.packed(r) for row, r in rows.items()} for t, rows in per_task.items()}
        for part, per_task in found.items()
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


def _several(title: str, seeds: Sequence[str], write: tables.PerSeed, found: Record) -> list[str]:
    return [part for seed in seeds for part in (f"### {title}, seed {seed}", write(found, seed))]


def _foreign(found: Record) -> list[str]:
    if not all("foreign" in parts for parts in found.seeds.values()):
        return []
    return ["## A foreign set", tables.foreign(found)]


def render(found: Record, curve: Path) -> str:
    """The card's text."""
    seeds = list(found.seeds)
    parts = [
        HEAD, "## Accuracy", tables.accuracy(found), tables.families(found), *_foreign(found),
        "## Depth: all visual tokens removed before a layer", *_several("Removed before", seeds, tables.removed, found),
        "## Depth: layers left out", *_several("One layer", seeds, tables.skips, found),
        *_several("Two layers", seeds, tables.pairs, found),
        "## With fewer visual tokens", *_several("Chosen at the door and before layer 2", seeds, tables.chosen, found),
        "## Is it the question?", *_several("16 tokens by attention", seeds, tables.control, found),
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
        known = {seed: record.known(file, one, arguments.questions) for seed, one in models.items()}
        seeds = {seed: known[seed] or measured(folder, arguments.questions) for seed, folder in folders.items()}
        record.save(file, families(arguments.questions), models, seeds)
    (model / "README.md").write_text(render(record.load(file), curve))
    print(model / "README.md")
    return 0
