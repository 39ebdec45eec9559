"""The tables of prunekit-smol's model card, from what was measured and from the curve of training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prunekit_evals.micro.card_tables import percent, shown, signed, table
from prunekit_evals.micro.questions import CHOICE, FAMILIES
from prunekit_evals.studies.smol.record import Record
from prunekit_evals.studies.smol.stages import SHARES

YES_NO = ("existence", "verify_color", "verify_place", "verify_word")
WEAK = ("same_color", "read_like", "where_same", "kind_same", "hint_like")  # questions that go by way of another thing
Line = dict[str, Any]


def _chance(family: str) -> str:
    return "50" if family in YES_NO else "25" if family in CHOICE else "-"


def accuracy(record: Record) -> str:
    """A line a family, dense and blind, and their means."""
    rows = []
    for place, (family, dense, blind) in enumerate(zip(FAMILIES, record.families("dense"), record.families("blind"),
                                                       strict=True)):  # fmt: skip
        questions = str(int(record.asked[place].sum()))
        rows.append([family, questions, shown(dense), percent(blind.value), _chance(family)])
    dense, blind = record.means(["dense", "blind"])
    rows.append(["**mean over families**", str(int(record.asked.sum())), shown(dense), shown(blind), "-"])
    return table(("family", "questions", "accuracy %", "blind", "chance"), rows)


def _against_dense(record: Record, names: Sequence[str], titles: Sequence[Sequence[str]], head: Sequence[str]) -> str:
    means, costs = record.means(names), record.differences([(name, "dense") for name in names])
    rows = [[*title, percent(mean.value), signed(cost)] for title, mean, cost in zip(titles, means, costs, strict=True)]
    return table((*head, "mean", "against dense"), rows)


def single(record: Record) -> str:
    """Every layer left out alone."""
    names = [name for name in record.right if name.startswith("skip ") and name.count(" ") == 1]
    return _against_dense(record, names, [[name.removeprefix("skip ")] for name in names], ["layer left out"])


def sets(record: Record) -> str:
    """Sets of layers left out, on the scenes that did not choose the greedy ones."""
    later = record.since(record.calibration)
    names = [name for name in record.right if name.startswith("skip ") and ": " in name]
    titles = [name.removeprefix("skip ").split(": ") for name in names]
    return _against_dense(later, names, titles, ["left out", "layers"])


def tokens(record: Record) -> str:
    """Visual tokens kept from a layer on, against random ones of as many at the same place."""
    names = [name for name in record.right if name.startswith("keep ") and ", skip" not in name]
    bases = [f"{name.rpartition(' ')[0]} random" for name in names]
    means, costs = record.means(names), record.differences([(name, "dense") for name in names])
    over = record.differences(list(zip(names, bases, strict=True)))
    rows = []
    for name, base, mean, cost, gain in zip(names, bases, means, costs, over, strict=True):
        _, count, _, layer, how = name.split()
        rows.append([layer, count, how, percent(mean.value), signed(cost), "" if name == base else signed(gain)])
    return table(("before layer", "tokens of 144", "chosen by", "mean", "against dense", "against random"), rows)


def lines(file: Path) -> list[Line]:
    """The lines of a `curve.jsonl`."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def stages(found: Sequence[Line]) -> str:
    """What each stage took, and what was right when it was over."""
    rows, begun = [], next(line["at"] for line in found if line["stage"] == "loaded")
    for stage in SHARES:
        ended = next(line for line in found if line["stage"] == stage and "ended" in line)
        held = next(line for line in found if line["stage"] == stage and "held name" in line)
        weak = [held[name] for name in WEAK if name in held]
        rows.append([f"`{stage}`", f"{ended['at'] - begun:.0f}", str(ended["step"]), percent(held["held name"]),
                     percent(held["mean"]) if "mean" in held else "-",
                     percent(sum(weak) / len(weak)) if weak else "-"])  # fmt: skip
        begun = held["at"]
    return table(("stage", "seconds", "steps", "patches named %", "answers %", "the weak five"), rows)


def curve(found: Sequence[Line]) -> str:
    """Held-out accuracy of every family when a stage was over."""
    held = {line["stage"]: line for line in found if "mean" in line}
    rows = [[family, *(f"{100 * line[family]:.0f}" for line in held.values())] for family in FAMILIES]
    return table(("family", *(f"`{stage}`" for stage in held)), rows)


__all__ = ["accuracy", "curve", "lines", "sets", "single", "stages", "tokens"]
