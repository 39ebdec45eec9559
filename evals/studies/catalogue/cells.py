"""Every pipeline's outcome on every task, computed once and kept: a run that was cut short goes on where it was."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from prunekit_evals.micro.benchmark import Item
from prunekit_evals.micro.record import packed, unpacked
from prunekit_evals.run.answering import Loaded
from prunekit_evals.run.stamp import TASKS, VERSION
from prunekit_evals.studies.catalogue import asked
from prunekit_evals.studies.catalogue.asked import Outcome

import prunekit
from prunekit import families
from prunekit.pipeline.build import Pipeline
from prunekit.strategy.decisions import ModelShape

Stages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Row:
    """One pipeline on all tasks.

    stages: as in a pipeline file. right: for each task whether each question was answered right. flops, kv: fractions
    of dense over all questions. kept: visual tokens left, a question's mean. decisions: FLOPs of the stages' own
    decisions, as a fraction of dense prefill.
    """

    stages: str
    right: Mapping[str, Sequence[bool]]
    flops: float
    kv: float
    kept: float
    decisions: float

    def as_data(self) -> dict[str, Any]:
        """Plain data; answers packed into one text a task."""
        figures = {name: round(getattr(self, name), 5) for name in ("flops", "kv", "kept", "decisions")}
        return {"stages": self.stages, **figures, "right": {task: packed(one) for task, one in self.right.items()}}

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Row:
        """From `as_data`."""
        right = {task: unpacked(text) for task, text in data["right"].items()}
        return cls(data["stages"], right, data["flops"], data["kv"], data["kept"], data["decisions"])


def pipeline(stages: Stages, budget: Mapping[str, Any] | None = None) -> Pipeline:
    """These stages as a pipeline."""
    data: dict[str, Any] = {"name": "study", "stages": [dict(stage) for stage in stages]}
    return prunekit.load(data | ({"budget": dict(budget)} if budget else {}))


@dataclass
class Bench:
    """A loaded model, its questions, and what has been asked of it.

    cache: folder of outcomes; what they depend on is in their names. fresh: compute all again. first: number of the
    first question. seen_once: as for `asked.batches`. tasks: of the bundled benchmark, those that are asked.
    """

    loaded: Loaded
    questions: int
    cache: Path
    fresh: bool = False
    first: int = 0
    seen_once: bool = True
    tasks: tuple[str, ...] = TASKS
    _done: set[Path] = field(default_factory=set)
    _calibration: dict[int, list[asked.Batch]] = field(default_factory=dict)

    @cached_property
    def shape(self) -> ModelShape:
        """The model's numbers."""
        return families.find(self.loaded.model).shape()

    @cached_property
    def items(self) -> dict[str, list[Item]]:
        """The questions of each task."""
        return {task: asked.benchmark_items(task, self.questions, self.first) for task in self.tasks}

    @cached_property
    def text_tokens(self) -> dict[int, int]:
        """Tokens of the prompts beside their visual ones, and how many prompts have so many."""
        every = ((question, task) for task in self.tasks for _, question in self.items[task])
        lengths = (asked.text_tokens(self.loaded, asked.wording(question, task)) for question, task in every)
        return dict(sorted(Counter(lengths).items()))

    @property
    def usual_text(self) -> int:
        """The mean number of them."""
        return round(sum(n * times for n, times in self.text_tokens.items()) / sum(self.text_tokens.values()))

    def ask(self, wanted: Iterable[Pipeline], count: int | None = None) -> dict[str, Row]:
        """Rows of pipelines by their sha; what is not known is computed, task by task. count: questions a task."""
        count = count or self.questions
        all_of_them = {one.sha: one for one in wanted}
        outcomes: dict[str, dict[str, Outcome]] = {sha: {} for sha in all_of_them}
        for task in self.tasks:
            missing = []
            for sha, one in all_of_them.items():
                stored = self._read(self._path(one, task, count))
                if stored is None:
                    missing.append(one)
                else:
                    outcomes[sha][task] = stored
            if missing:
                self._compute(task, missing, count, outcomes)
        return {sha: _row(one, outcomes[sha]) for sha, one in all_of_them.items()}

    def on_calibration(self, wanted: Sequence[Pipeline], count: int) -> list[float]:
        """Accuracy of each pipeline on questions that the benchmark does not have."""
        if count not in self._calibration:
            items = asked.calibration_items(count)
            by_words: dict[bool, list[Item]] = {}
            for item in items:
                by_words.setdefault(bool(item[1].choices), []).append(item)  # prompts of like length together
            seen = [b for some in by_words.values() for b in asked.batches(self.loaded, some, None)]
            self._calibration[count] = seen
        return [self._calibrated(one, count) for one in wanted]

    def _calibrated(self, one: Pipeline, count: int) -> float:
        path = self._path(one, "calibration", count)
        stored = self._read(path)
        if stored is None:
            stored = sum((asked.outcome(self.loaded, one, batch) for batch in self._calibration[count]), Outcome())
            self._write(path, stored)
        return sum(stored.right) / len(stored.right)

    def _compute(
        self, task: str, missing: Sequence[Pipeline], count: int, outcomes: dict[str, dict[str, Outcome]]
    ) -> None:
        seen = list(asked.batches(self.loaded, self.items[task][:count], task, self.seen_once))
        begun = time.perf_counter()
        for number, one in enumerate(missing):
            result = sum((asked.outcome(self.loaded, one, batch) for batch in seen), Outcome())
            self._write(self._path(one, task, count), result)
            outcomes[one.sha][task] = result
            if number % 10 == 9 or number + 1 == len(missing):
                taken = time.perf_counter() - begun
                say(f"{task}: {number + 1} of {len(missing)} pipelines, {count} questions each, {taken:.0f} s")

    def _path(self, one: Pipeline, task: str, count: int) -> Path:
        parts = (one.sha, self.loaded.identity, self.loaded.dtype, VERSION, task, str(count))
        parts += (f"from {self.first}",) * bool(self.first) + ("pixels",) * (not self.seen_once)
        return self.cache / f"{hashlib.sha256(' '.join(parts).encode()).hexdigest()[:24]}.json"

    def _read(self, path: Path) -> Outcome | None:
        if not path.is_file() or (self.fresh and path not in self._done):
            return None
        data = json.loads(path.read_text())
        return Outcome(
            tuple(unpacked(data["right"])), tuple(data["flops"]), tuple(data["kv"]), data["kept"], data["decisions"]
        )

    def _write(self, path: Path, one: Outcome) -> None:
        self.cache.mkdir(parents=True, exist_ok=True)
        data = {"right": packed(one.right), "flops": one.flops, "kv": one.kv, "kept": one.kept}
        part = path.with_suffix(".part")
        part.write_text(json.dumps({**data, "decisions": one.decisions}))
        part.replace(path)
        self._done.add(path)


def _row(one: Pipeline, by_task: Mapping[str, Outcome]) -> Row:
    total = sum(by_task.values(), Outcome())
    return Row(
        told(one),
        {task: one.right for task, one in by_task.items()},
        total.flops[0] / total.flops[1],
        total.kv[0] / total.kv[1],
        total.kept / len(total.right),
        total.decisions / total.flops[1],
    )


def told(one: Pipeline) -> str:
    """The stages as a pipeline file would have them, in one line; what is left to defaults is left out."""
    defaults = {}
    for stage in one.stages:
        fields = dataclasses.fields(stage.strategy)
        defaults[stage.use] = {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}
    stages = [
        {key: value for key, value in stage.items() if key == "use" or value != _plain(defaults[stage["use"]], key)}
        for stage in yaml.safe_load(one.resolved)["stages"]
    ]
    return yaml.safe_dump(stages, default_flow_style=True, sort_keys=False, width=10**6).strip()


def _plain(defaults: Mapping[str, Any], key: str) -> Any:
    value = defaults.get(key, dataclasses.MISSING)
    return list(value) if isinstance(value, tuple) else value


def say(text: str) -> None:
    """A message for whoever waits."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
