"""The bundled model's scenes as prompts to train routers on: `prunekit train --data micro-scenes`.

Scenes are drawn from numbers that neither the model's training nor its benchmark uses.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from prunekit.training.data import Sample, Source

from .micro import prompts
from .micro.compose import scene
from .micro.questions import CHOICE, OPEN, Question, ask

FIRST = 1 << 50  # the model's own training begins at 1 << 40, and its benchmark lies below 1 << 30
COUNT = 1_000_000
DIGEST = "micro-scenes-1"


class ScenePrompts:
    """One scene and one question for every number; half of them with choices, in the words of the standard tasks."""

    digest = DIGEST

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < COUNT:
            raise IndexError(index)
        rng = np.random.default_rng([index, 7])
        shown = scene(FIRST + index)
        families = tuple(OPEN) if rng.random() < 0.5 else tuple(CHOICE)
        question = None
        while question is None:
            question = ask(shown, rng, families[int(rng.integers(len(families)))])
        return Sample((Image.fromarray(np.asarray(shown.image)),), _worded(question, rng))


def _worded(question: Question, rng: np.random.Generator) -> str:
    if question.choices:
        return prompts.mmbench(question) if rng.random() < 0.5 else prompts.scienceqa(question)
    return prompts.word(question)


def source() -> Source:
    """The data."""
    return ScenePrompts()
