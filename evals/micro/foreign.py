"""A foreign set that nobody here made: easy-vqa 1.0 (PyPI, MIT licence, github.com/vzhou842/easy-VQA).

5,000 images of one shape each, 64x64, and 48,000 questions with 13 answers. Its train split takes part in
stages 2 and 3, its test split is scored and reported apart.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image
from prunekit_evals.micro.compose import IMAGE_SIZE
from prunekit_evals.micro.question import Question, pick

YES_NO = {"yes": "Yes", "no": "No"}


@dataclass(frozen=True, eq=False)
class ForeignImage:
    """One image, rescaled to uint8 `[168, 168, 3]`, and all its questions."""

    image: np.ndarray
    questions: tuple[Question, ...]


def folder() -> Path:
    """Where the package's data lie. Raises ModuleNotFoundError, saying what to install, where it is missing."""
    try:
        return Path(str(resources.files("easy_vqa"))) / "data"
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the foreign set needs easy-vqa: pip install 'prunekit[micro]'") from error


@functools.cache
def questions(split: str) -> dict[int, tuple[Question, ...]]:
    """Questions of `train` or `test` by image; the family says what kind of answer is wanted."""
    by_image: dict[int, list[Question]] = {}
    for text, answer, image in json.loads((folder() / split / "questions.json").read_text()):
        family = "yes_no" if answer in YES_NO else "shape" if answer in ("circle", "rectangle", "triangle") else "color"
        by_image.setdefault(image, []).append(Question(f"foreign_{family}", split, text, YES_NO.get(answer, answer)))
    return {image: tuple(asked) for image, asked in by_image.items()}


@functools.lru_cache(maxsize=6000)
def image(split: str, image: int) -> ForeignImage:
    with Image.open(folder() / split / "images" / f"{image}.png") as file:
        scaled = file.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE), Image.BICUBIC)
    return ForeignImage(np.asarray(scaled), questions(split)[image])


def draw(rng: np.random.Generator, count: int) -> list[ForeignImage]:
    """Images of the train split."""
    numbers = list(questions("train"))
    return [image("train", numbers[int(i)]) for i in rng.integers(len(numbers), size=count)]


def asked(rng: np.random.Generator, shown: ForeignImage, count: int) -> list[Question]:
    """Half of the questions drawn want a shape or a color; the set itself has three in four that want yes or no."""
    open_ones = [q for q in shown.questions if q.family != "foreign_yes_no"]
    return [pick(rng, open_ones if open_ones and rng.integers(2) else shown.questions) for _ in range(count)]
