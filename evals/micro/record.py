"""What was measured, right or wrong question by question, kept beside the weights, in one line, as `measured.jsonl`.

`{"families": {task: [family, ...]}, "models": {seed: identity}, "seeds": {seed: {part: {task: {row: rights}}}}}`,
where `rights` is the number of questions and, in hexadecimal, one bit a question, the first question first.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prunekit_evals.compare.stats import Estimate, average, paired, wilson

Rights = dict[str, str]


def packed(rights: Sequence[bool]) -> str:
    return f"{len(rights)}:{int('1' + ''.join(str(int(r)) for r in rights), 2):x}"


def unpacked(text: str) -> list[bool]:
    count, bits = text.split(":")
    rights = [bit == "1" for bit in f"{int(bits, 16):b}"[1:]]
    if len(rights) != int(count):
        raise ValueError(f"{len(rights)} bits where {count} questions were measured")
    return rights


@dataclass(frozen=True)
class Part:
    """One part of one seed's measurement: `{task: {row: rights}}`."""

    tasks: dict[str, dict[str, list[bool]]]

    def rows(self) -> list[str]:
        return list(next(iter(self.tasks.values())))

    def right(self, row: str, task: str) -> list[bool]:
        return self.tasks[task][row]

    def share(self, row: str, task: str) -> Estimate:
        return wilson(self.right(row, task))

    def mean(self, row: str) -> float:
        """Unweighted over tasks."""
        return sum(self.share(row, task).value for task in self.tasks) / len(self.tasks)

    def cost(self, row: str, other: str, against: Part | None = None) -> Estimate:
        """Mean over tasks of `row` minus `other`, paired by question; `against` holds `other` if not this."""
        estimate = average([self.difference(row, other, task, against) for task in self.tasks])
        assert estimate is not None
        return estimate

    def difference(self, row: str, other: str, task: str, against: Part | None = None) -> Estimate:
        """The same on one task."""
        return _paired(task, self.right(row, task), (against or self).right(other, task))


def _paired(task: str, ours: Sequence[bool], theirs: Sequence[bool]) -> Estimate:
    groups = {i: str(i // 2) for i in range(len(ours))} if task == "mme" else None  # two questions an image
    estimate = paired(dict(enumerate(map(float, ours))), dict(enumerate(map(float, theirs[: len(ours)]))), groups)
    assert estimate is not None
    return estimate


@dataclass(frozen=True)
class Record:
    """A whole file."""

    families: dict[str, list[str]]
    seeds: dict[str, dict[str, Part]]


def load(path: Path) -> Record:
    data = json.loads(path.read_text())
    seeds = {
        seed: {
            part: Part({task: {row: unpacked(r) for row, r in rows.items()} for task, rows in tasks.items()})
            for part, tasks in parts.items()
        }
        for seed, parts in data["seeds"].items()
    }
    return Record(data["families"], seeds)


Measured = dict[str, dict[str, dict[str, str]]]  # part -> task -> row -> rights


def earlier(path: Path, identity: str, questions: int) -> Measured | None:
    """What an earlier run measured of the model with this identity, with as many questions a task; None if nothing."""
    data = json.loads(path.read_text()) if path.exists() else {"models": {}}
    for seed, one in data.get("models", {}).items():
        measured: Measured = data["seeds"][seed]
        if one == identity and all(len(unpacked(rows["dense"])) == questions for rows in measured["dense"].values()):
            return measured
    return None


def save(path: Path, families: dict[str, list[str]], models: dict[str, str], seeds: dict[str, Measured]) -> None:
    path.write_text(json.dumps({"families": families, "models": models, "seeds": seeds}) + "\n")
