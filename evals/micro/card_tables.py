"""The tables of the model card, from what was measured."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from prunekit_evals.compare.stats import Estimate, wilson
from prunekit_evals.micro.packing import OPEN_SHARES
from prunekit_evals.micro.record import Part, Record

PerSeed = Callable[[Record, str], str]
CHANCE = {"pope": 50, "mme": 50, "mmbench_en_dev_static": 25, "scienceqa_img": 25}


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(header)
    lines = [head, ["---"] * len(head), *map(list, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def shown(estimate: Estimate) -> str:
    return f"{percent(estimate.value)} ({percent(estimate.low)} to {percent(estimate.high)})"


def signed(estimate: Estimate) -> str:
    return f"{100 * estimate.value:+.1f} ({100 * estimate.low:+.1f} to {100 * estimate.high:+.1f})"


def _first(record: Record) -> tuple[str, dict[str, Part]]:
    return next(iter(record.seeds.items()))


def accuracy(record: Record) -> str:
    """One line a task: for every seed dense with its interval, and blind; chance."""
    seeds = list(record.seeds)
    head = ["task", "questions", "chance", *itertools.chain(*((f"seed {s}", f"blind {s}") for s in seeds))]
    rows = []
    for task in _first(record)[1]["dense"].tasks:
        parts = [record.seeds[s]["dense"] for s in seeds]
        cells = [(shown(p.share("dense", task)), percent(p.share("blind", task).value)) for p in parts]
        count = str(len(parts[0].right("dense", task)))
        rows.append([f"`{task}`", count, str(CHANCE.get(task, "-")), *itertools.chain(*cells)])
    return table(head, rows)


def families(record: Record) -> str:
    """The same by family of questions, for the shipped seed."""
    dense = _first(record)[1]["dense"]
    rows = []
    for task in dense.tasks:
        names = record.families[task]
        for family in dict.fromkeys(names):
            places = [i for i, name in enumerate(names) if name == family]
            right, blind = ([dense.right(row, task)[i] for i in places] for row in ("dense", "blind"))
            rows.append([f"`{task}`", family, str(len(right)), shown(wilson(right)), percent(wilson(blind).value)])
    return table(("task", "family", "questions", "accuracy %", "blind"), rows)


def _lines(part: Part, rows: Sequence[str], base: str, against: Part | None = None) -> list[list[str]]:
    """For each row its mean, its paired difference to `base` and its tasks."""
    lines = []
    for row in rows:
        each = [percent(part.share(row, task).value) for task in part.tasks]
        lines.append([row, percent(part.mean(row)), signed(part.cost(row, base, against)), *each])
    return lines


def _tasks(part: Part) -> list[str]:
    return [f"`{task}`" for task in part.tasks]


def removed(record: Record, seed: str) -> str:
    parts = record.seeds[seed]
    part = parts["removed"]
    return table(("all removed", "mean", "against dense", *_tasks(part)),
                 _lines(part, part.rows(), "dense", parts["dense"]))  # fmt: skip


def skips(record: Record, seed: str) -> str:
    parts = record.seeds[seed]
    part = parts["skips"]
    return table(("layer left out", "mean", "against dense", *_tasks(part)),
                 _lines(part, part.rows(), "dense", parts["dense"]))  # fmt: skip


def chosen(record: Record, seed: str) -> str:
    """Every choice of tokens, against a random one of as many at the same place."""
    lines = []
    for part in (record.seeds[seed]["chosen"], record.seeds[seed]["more"]):
        for row in part.rows():
            lines += _lines(part, [row], f"{row.split('%')[0]}% random")
    return table(("tokens kept", "mean", "against random", *_tasks(part)), lines)


def control(record: Record, seed: str) -> str:
    """Attention-scored choices: this question's scores against random, and against another question's."""
    part = record.seeds[seed]["control"]
    lines = []
    for row in part.rows():
        if not row.endswith(", this"):
            continue
        base, other = f"{' '.join(row.split()[:2])} random", row.replace(", this", ", other")
        lines.append([row.removesuffix(", this"), *(percent(part.mean(r)) for r in (base, other, row)),
                      signed(part.cost(row, base)), signed(part.cost(row, other))])  # fmt: skip
    head = ("scored by the attention of", "random", "another question's scores", "its own", "own against random",
            "own against another's")  # fmt: skip
    return table(head, lines)


def pairs(record: Record, seed: str) -> str:
    """The best two layers to leave out: one pair for all, one a question."""
    parts = record.seeds[seed]
    part = parts["pairs"]
    names = part.rows()
    static = max(names, key=part.mean)
    best = {}
    for task in part.tasks:
        rights = {row: part.right(row, task) for row in names}
        best[task] = [any(column) for column in zip(*rights.values(), strict=True)]
    dense = {task: parts["dense"].right("dense", task)[: len(best[task])] for task in part.tasks}
    whole = Part({
        task: {"none left out": dense[task], f"one pair for all: {static}": part.right(static, task),
               "the best pair of each question": best[task]}
        for task in part.tasks
    })  # fmt: skip
    return table(("two layers left out", "mean", "against one pair for all", *_tasks(whole)),
                 _lines(whole, whole.rows(), f"one pair for all: {static}"))  # fmt: skip


def foreign(record: Record) -> str:
    rows = []
    for seed, parts in record.seeds.items():
        part = parts["foreign"]
        names = record.families["easy_vqa"]
        for family in ("all", *dict.fromkeys(names)):
            places = [i for i, name in enumerate(names) if family in ("all", name)]
            right, blind = ([part.right(row, "easy_vqa")[i] for i in places] for row in ("dense", "blind"))
            rows.append([seed, family.removeprefix("foreign_"), str(len(right)), shown(wilson(right)),
                         percent(wilson(blind).value)])  # fmt: skip
    return table(("seed", "answers", "questions", "accuracy %", "blind"), rows)


def curve(path: Path) -> str:
    """Held-out accuracy of the measured families as the stages that learn answers went on."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    read = [line for line in lines if "existence" in line]
    names = [*OPEN_SHARES, "same_color", "kind_by_color", "where_same", "kind_same", "choice_color", "hint_color",
             "hint_like", "all", "keep11", "before2", "before4", "blind"]  # fmt: skip
    names = [n for n in names if all(n in line for line in read)]
    rows = [
        [f"{line['stage']} {line['step']}", f"{line['loss']:.3f}", *(f"{100 * line[n]:.0f}" for n in names)]
        for line in read
    ]
    return table(("step", "loss", *names), rows)
