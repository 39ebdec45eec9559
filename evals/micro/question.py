"""What a question is, and how things, choices and nouns are drawn for one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from prunekit_evals.micro.compose import Scene, Thing
from prunekit_evals.micro.lexicon import NOUNS, POPULAR, THEMES

T = TypeVar("T")
LETTERS = "ABCD"


@dataclass(frozen=True)
class Question:
    """A bare question (no instruction, no options in `text`) and its answer.

    `answer` is `Yes` / `No`, a word or two, or, where there are `choices`, the letter of the right one.
    """

    family: str
    category: str
    text: str
    answer: str
    choices: tuple[str, ...] = ()
    hint: str = ""


def pick(rng: np.random.Generator, items: Sequence[T]) -> T:
    return items[int(rng.integers(len(items)))]


def some(rng: np.random.Generator, items: Sequence[T], count: int) -> list[T]:
    """At most `count` different ones."""
    return [items[i] for i in rng.permutation(len(items))[:count]]


def choice(rng: np.random.Generator, family: str, category: str, text: str, right: str, wrong: Sequence[str],
           hint: str = "") -> Question:  # fmt: skip
    """Four choices in random order; the answer is the letter of the right one."""
    options = [right, *wrong]
    choices = tuple(options[i] for i in rng.permutation(4))
    return Question(family, category, text, LETTERS[choices.index(right)], choices, hint)


def absent(shown: Scene, rng: np.random.Generator, category: str, count: int = 1) -> list[str]:
    """Nouns that are not in the scene: any, popular ones, or (adversarial) ones of the scene's own theme."""
    pool = {"random": NOUNS, "popular": POPULAR, "adversarial": tuple(THEMES[shown.theme])}[category]
    present = {t.noun for t in shown.objects}
    return some(rng, [n for n in pool if n not in present], count)


def unique(things: Sequence[Thing], of: Callable[[Thing], str]) -> list[Thing]:
    """The things whose color (say) no other of them shares."""
    values = [of(t) for t in things]
    return [t for t, v in zip(things, values, strict=True) if values.count(v) == 1]


def alone(shown: Scene) -> list[Thing]:
    """Objects that stand alone in their quadrant beyond doubt."""
    if not all(t.clear for t in shown.objects):
        return []
    return unique(shown.objects, lambda t: t.place)


def twins(shown: Scene) -> list[tuple[Thing, Thing]]:
    """Ordered pairs of objects that share their color with each other and no third one."""
    pairs = []
    for a in shown.objects:
        kin = [t for t in shown.objects if t.color == a.color and t is not a]
        if len(kin) == 1:
            pairs.append((a, kin[0]))
    return pairs
