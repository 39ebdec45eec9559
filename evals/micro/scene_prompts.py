"""The bundled model's scenes as prompts to train routers on: `prunekit train --data micro-scenes`.

Questions are of the families of the benchmark's six tasks, in its shares and its words. Scenes are drawn from numbers
that neither the model's training nor the benchmark uses.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image
from prunekit_evals.micro import prompts
from prunekit_evals.micro.benchmark import GQA_SHARES, MMBENCH_SHARES, SCIENCE_SHARES, TEXT_SHARES
from prunekit_evals.micro.compose import Scene, scene
from prunekit_evals.micro.questions import Question, ask

from prunekit.training.data import Sample, Source

FIRST = 1 << 50  # the model's own training begins at 1 << 40, and its benchmark lies below 1 << 30
COUNT = 1_000_000
AGAIN = 1 << 20  # further on for the next scene, where one admits no question of the family
DIGEST = "micro-scenes-2"


@dataclass(frozen=True)
class Task:
    """A task of the benchmark: families of questions with their shares, and how it words them."""

    shares: Mapping[str, float]
    worded: Callable[[Question], str]


SHARES: Mapping[str, Mapping[str, float]] = {
    "pope": {"existence": 1.0},
    "mme": dict.fromkeys(("existence", "verify_color", "verify_place", "verify_word"), 0.25),
    "gqa": GQA_SHARES, "mmbench_en_dev_static": MMBENCH_SHARES, "scienceqa_img": SCIENCE_SHARES,
    "textvqa_val": TEXT_SHARES,
}  # fmt: skip
TASKS = tuple(Task(shares, prompts.BY_TASK[name]) for name, shares in SHARES.items())


class ScenePrompts:
    """One scene and one question for every number; each task as often as any other."""

    digest = DIGEST

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < COUNT:
            raise IndexError(index)
        shown, question, task = self.drawn(index)
        return Sample((Image.fromarray(np.asarray(shown.image)),), task.worded(question))

    def drawn(self, index: int) -> tuple[Scene, Question, Task]:
        """What stands behind a number."""
        rng = np.random.default_rng([index, 7])
        task = TASKS[int(rng.integers(len(TASKS)))]
        families, shares = list(task.shares), np.array(list(task.shares.values()))
        family = families[int(rng.choice(len(families), p=shares / shares.sum()))]
        for attempt in itertools.count():
            shown = scene(FIRST + index + attempt * AGAIN)
            question = ask(shown, rng, family)
            if question is not None:
                return shown, question, task
        raise AssertionError("count() does not end")


def source() -> Source:
    """The data."""
    return ScenePrompts()
