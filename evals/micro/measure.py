"""Measure a checkpoint on the held-out benchmark: fewer tokens before or inside the decoder, layers left out."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from prunekit_evals.micro import foreign
from prunekit_evals.micro.benchmark import ITEMS, Item
from prunekit_evals.micro.compose import TOKENS, Scene
from prunekit_evals.micro.judge import Judge, Trace
from prunekit_evals.micro.question import Question, pick
from prunekit_evals.micro.questions import CHOICE, HOPS, OPEN, ask
from prunekit_evals.micro.selections import SELECTIONS, View, most
from prunekit_evals.run.stamp import TASKS
from torch import Tensor

BATCH = 50
FEW = 0.11
QUESTIONS = 500  # a task
FOREIGN = 800  # drawn from the foreign test split, of which the first are asked
Rights = dict[str, list[bool]]  # row -> whether each question is answered right


@dataclass(frozen=True)
class Batch:
    """Some questions, one an image, and their dense forward."""

    judge: Judge
    view: View
    trace: Trace
    items: list[Item]
    task: str

    def none(self) -> Tensor:
        """No visual token."""
        return torch.empty(len(self.items), 0, dtype=torch.int64)

    def right(self, layer: int = 0, keep: Tensor | None = None, skip: Sequence[int] = ()) -> list[bool]:
        return self.judge.right(self.trace, layer, keep, skip)


Measure = Callable[[Batch], Rights]


def dense(batch: Batch) -> Rights:
    """With all visual tokens, and with none."""
    return {"dense": batch.right(), "blind": batch.right(0, batch.none())}


def removed(batch: Batch) -> Rights:
    """All visual tokens removed before each layer."""
    return {f"before {k}": batch.right(k, batch.none()) for k in range(1, batch.judge.layers)}


def _chosen(batch: Batch, share: float) -> Rights:
    count, rows = round(share * TOKENS), {}
    kept = {name: choose(batch.view, count) for name, choose in SELECTIONS.items()}
    for site, layer in (("decoder input", 0), ("layer 2", 2)):
        if layer:
            kept["FastV"] = most(batch.trace.last[layer - 1], count)
        rows |= {f"{site} {share:.0%} {name}": batch.right(layer, keep) for name, keep in kept.items()}
    return rows


def chosen(batch: Batch) -> Rights:
    """Few tokens, chosen in many ways, at the decoder input and before layer 2."""
    return _chosen(batch, FEW)


def more(batch: Batch) -> Rights:
    """The same with a quarter of the tokens."""
    return _chosen(batch, 0.25)


def control(batch: Batch) -> Rights:
    """Few tokens by what a question or its last token attends to: this one's scores, and another's on the image.

    The attention is that of the layer before (it ran), or that of the layer itself (it is looked ahead at).
    """
    trace = batch.trace
    other = batch.judge.trace(batch.view, [_another(shown, q) for shown, q in batch.items], batch.task)
    count, rows = round(FEW * TOKENS), {}
    for layer in (2, 3):
        rows[f"layer {layer} random"] = batch.right(layer, SELECTIONS["random"](batch.view, count))
        for whose, source in (("this", trace), ("other", other)):
            asked = {
                "last token (FastV)": source.last[layer - 1], "question": source.text[layer - 1],
                "question, look-ahead": source.text[layer],
            }  # fmt: skip
            for name, scores in asked.items():
                rows[f"layer {layer} {name}, {whose}"] = batch.right(layer, most(scores, count))
    return rows


def skips(batch: Batch) -> Rights:
    """One layer left out."""
    return {f"skip {i}": batch.right(skip=(i,)) for i in range(batch.judge.layers)}


def pairs(batch: Batch) -> Rights:
    """Any two layers left out."""
    return {f"skip {a} {b}": batch.right(skip=(a, b)) for a, b in itertools.combinations(range(batch.judge.layers), 2)}


def _another(shown: Scene, question: Question) -> Question:
    """Another question about the image, of the same family if there is one."""
    rng = np.random.default_rng([shown.seed, 9])
    kind = CHOICE if question.choices else OPEN | HOPS  # prompts with choices need a question that has some
    names = [question.family] * 12 + list(rng.permutation(list(kind)))
    for family in names:
        candidate = ask(shown, rng, str(family))
        if candidate is not None and (candidate.text, candidate.hint) != (question.text, question.hint):
            return candidate
    raise ValueError(f"scene {shown.seed} admits no second question")


PARTS: dict[str, tuple[Measure, int]] = {  # the part and on how many questions of a task
    "dense": (dense, 500), "removed": (removed, 500), "chosen": (chosen, 500), "more": (more, 50),
    "control": (control, 500), "skips": (skips, 100), "pairs": (pairs, 50),
}  # fmt: skip


def measure(folder: Path, parts: Iterable[str] = PARTS, tasks: Iterable[str] = TASKS, most: int = QUESTIONS):
    """`{part: {task: {row: [right, ...]}}}` on at most `most` questions of each task."""
    judge = Judge(folder)
    table: dict[str, dict[str, Rights]] = {}
    for task in tasks:
        for part, rows in _all(judge, parts, ITEMS[task](QUESTIONS)[:most], task).items():
            table.setdefault(part, {})[task] = rows
    return table


def _all(judge: Judge, parts: Iterable[str], items: list[Item], task: str) -> dict[str, Rights]:
    by_part: dict[str, Rights] = {part: {} for part in parts}
    for begin in range(0, len(items), BATCH):
        some = items[begin : begin + BATCH]
        view = judge.view(some)
        batch = Batch(judge, view, judge.trace(view, [q for _, q in some], task), some, task)
        for part, rows in by_part.items():
            run, count = PARTS[part]
            if begin < count:
                for name, rights in run(batch).items():
                    rows.setdefault(name, []).extend(rights)
    return by_part


def foreign_items(count: int) -> list[Item]:
    """Questions of easy-vqa's own test split, one an image and evenly over its images."""
    by_image = foreign.questions("test")
    ids = sorted(by_image)
    rng = np.random.default_rng(0)
    items = []
    for i in range(count):
        shown = foreign.image("test", ids[i * len(ids) // count])
        items.append((Scene(i, "", shown.image, ()), pick(rng, shown.questions)))
    return items


def measure_foreign(folder: Path, most: int = QUESTIONS) -> Rights:
    """Dense and blind on the foreign set."""
    return _all(Judge(folder), ("dense",), foreign_items(FOREIGN)[:most], "easy_vqa")["dense"]
