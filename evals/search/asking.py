"""Asks pipelines the calibration's questions, rung by rung, with one loaded model; what was answered is kept.

Of each candidate there is one file, named by all that its answers depend on, with the scores of the rungs that it has
reached: the memory of a search. A search that was interrupted draws the same candidates again, finds their scores, and
goes on behind them; so nothing of the search itself needs to be stored.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from prunekit_evals.lmms import harness, parts, quiet, scoring, tasks
from prunekit_evals.lmms.requests import Settings
from prunekit_evals.lmms.tasks import Built
from prunekit_evals.run import files, unanswered
from prunekit_evals.run.answering import Loaded, Tally
from prunekit_evals.run.identity import code_identity
from prunekit_evals.run.journal import Facts, key_of
from prunekit_evals.run.kept import ROOM, Kept
from prunekit_evals.runner import Plan, Runner
from prunekit_evals.search.split import Part, levels_of, rungs

from prunekit.errors import InputError
from prunekit.pipeline.build import Pipeline

KIND, SCHEMA = "prunekit-candidate", 1


@dataclass
class Questions:
    """The questions of a plan's tasks, each task read once."""

    plan: Plan
    _built: dict[str, Built] = field(default_factory=dict)

    def whole(self, task: str) -> Built:
        """The task with all its questions."""
        if task not in self._built:
            named = next(one for one in self.plan.tasks if one.name == task)
            with quiet.harness():
                data = tasks.data_of(named, self.plan.data)
                self._built[task] = tasks.build(named, data, None, self.plan.prompt_profile)
        return self._built[task]

    def part(self, task: str, numbers: Sequence[int]) -> Built:
        """The task with these questions."""
        whole = self.whole(task)
        return replace(whole, task=parts.select(whole.task, numbers), questions=len(numbers), limit=None)

    def images(self, task: str) -> list[frozenset[str]]:
        """For each question the identities of its images."""
        whole = self.whole(task)
        return parts.images(whole.task, whole.chat)


@dataclass(frozen=True)
class Rung:
    """What one rung's new questions gave: task -> their scores, in [0, 1]; and means over their prompts.

    input_tokens: of the prompt. flops: of the prefill, over dense's. None where nothing was reported.
    """

    scores: Mapping[str, tuple[float, ...]]
    input_tokens: float | None
    visual_tokens: float | None
    flops: float | None


@dataclass(frozen=True)
class Answered:
    """What is known of a pipeline: the rungs that it was asked."""

    rungs: tuple[Rung, ...] = ()

    def accuracy(self, level: int) -> float:
        """Unweighted mean over the tasks, on all questions up to this rung."""
        tasks_ = [[one.scores[task] for one in self.rungs[: level + 1]] for task in self.rungs[0].scores]
        return statistics.fmean(statistics.fmean(score for rung in of for score in rung) for of in tasks_)

    def mean(self, name: str) -> float | None:
        """Of `input_tokens`, `visual_tokens` or `flops`, over all questions; None where a rung does not know it."""
        values = [getattr(one, name) for one in self.rungs]
        weights = [sum(map(len, one.scores.values())) for one in self.rungs]
        return None if None in values else statistics.fmean(values, weights)


class Asker(Protocol):
    """Who knows how well pipelines answer."""

    levels: int

    def ask(self, pipeline: Pipeline, level: int) -> Answered:
        """The scores of all rungs up to this one. Raises what the pipeline raises."""


@dataclass
class Calibration:
    """Asks a model through lmms-eval. folder: of the candidates' files.

    runner: of a plan without pipelines, for its model and its conditions. part: of the questions, by task.
    """

    runner: Runner
    questions: Questions
    part: Mapping[str, Part]
    factor: int
    folder: Path
    advance: Callable[[int], None] = lambda questions: None
    levels: int = field(init=False)
    _rungs: Mapping[str, tuple[tuple[int, ...], ...]] = field(init=False)
    _kept: dict[tuple[str, int], Kept] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        """Decide about the rungs."""
        counts = [sum(map(len, part)) for part in self.part.values()]
        self.levels = levels_of(min(counts), self.factor)
        self._rungs = {task: rungs(part, self.levels, self.factor) for task, part in self.part.items()}

    def ask(self, pipeline: Pipeline, level: int) -> Answered:
        """The scores of all rungs up to this one, those that were answered before from the candidate's file."""
        path = self.folder / f"{self._key(pipeline)}.json"
        known = _read(path)
        while len(known.rungs) <= level:
            known = Answered((*known.rungs, self._rung(pipeline, len(known.rungs), path)))
            about = {"kind": KIND, "schema": SCHEMA, "pipeline": pipeline.resolved, **asdict(known)}
            files.write(path, json.dumps(about, indent=1) + "\n")
            _journal(path).unlink(missing_ok=True)
        return known

    def _key(self, pipeline: Pipeline) -> str:
        conditions = asdict(self.runner.conditions)
        return key_of(
            conditions=conditions, pipeline=pipeline.sha, code=code_identity(pipeline), rungs=self._rungs, schema=SCHEMA
        )[:16]

    def _rung(self, pipeline: Pipeline, level: int, path: Path) -> Rung:
        """The new questions of one rung; answers are journaled beside the candidate's file until it has them."""
        from prunekit_evals.lmms.adapter import PruneKitChat, PruneKitSimple

        plan = self.runner.plan
        path.parent.mkdir(parents=True, exist_ok=True)
        scores: dict[str, tuple[float, ...]] = {}
        facts: list[Facts] = []
        lengths: list[int] = []
        for task, added in self._rungs.items():
            part = self.questions.part(task, added[level])
            kind = PruneKitChat if part.chat else PruneKitSimple
            model = kind.over(self._loaded(task, level), pipeline, Settings.of(plan), str(_journal(path)))
            model.progress = self.advance
            model.unanswered.tolerant = True
            with model.journal:
                samples = harness.evaluate(model, part, path.with_suffix(".files"))["samples"][task]
            lost = model.unanswered.of(task)
            unanswered.judge(lost, len(samples), plan.unanswered == "fail")
            scores[task] = _scores(task, samples, lost)
            facts += model.tally.facts
            lengths += [one["input_tokens"] for sample in samples for one in sample["token_counts"] if one]
        saved = harness.saved(Tally(facts=facts))
        return Rung(
            scores,
            statistics.fmean(lengths) if lengths else None,
            saved.visual_tokens if saved else None,
            saved.flops_fraction if saved else None,
        )

    def _loaded(self, task: str, level: int) -> Loaded:
        """The model, with a store of its own for each part: questions of parts have the same numbers."""
        rooms = len(self._rungs) * self.levels
        kept = self._kept.setdefault((task, level), Kept(ROOM // rooms))
        return replace(self.runner.loaded, kept=kept)


def _scores(task: str, samples: Sequence[Mapping[str, Any]], lost: Mapping[int, str]) -> tuple[float, ...]:
    """lost: question -> why it could not be answered, which counts as wrong. Raises InputError where none has one."""
    found = tuple(one.score for one in scoring.questions(task, samples, None, lost) if one.score is not None)
    if not found:
        raise InputError(f"task '{task}' gives its questions no scores of their own, by which candidates are compared")
    return found


def _read(path: Path) -> Answered:
    """What the file of a candidate knows; nothing where it is missing or damaged: it is then asked again."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["kind"] != KIND or data["schema"] != SCHEMA:
            return Answered()
        return Answered(tuple(Rung(**one) for one in data["rungs"]))
    except (OSError, ValueError, KeyError, TypeError):
        return Answered()


def _journal(path: Path) -> Path:
    return path.with_suffix(".journal.jsonl")
