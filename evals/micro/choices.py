"""Questions with four choices, without and with a context that says which thing is wanted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from prunekit_evals.micro.compose import Scene, Thing, draw_nouns
from prunekit_evals.micro.lexicon import COLOR_NAMES, PLACES, SIGNS
from prunekit_evals.micro.question import Question, absent, alone, choice, pick, some, twins, unique

NAMES = ("Mia", "Leo", "Anna", "Tom")


def choice_existence(shown: Scene, rng: np.random.Generator) -> Question:
    """One noun of the scene among three that are absent but drawn by the scenes' own law."""
    thing = pick(rng, shown.objects)
    present = {t.noun for t in shown.objects}
    wrong = [n for n in draw_nouns(rng, shown.theme, 9) if n not in present][:3]
    return choice(rng, "choice_existence", "identity", "Which object is in the image?", thing.noun, wrong)


def choice_color(shown: Scene, rng: np.random.Generator) -> Question:
    thing = pick(rng, shown.objects)
    wrong = some(rng, [c for c in COLOR_NAMES if c != thing.color], 3)
    return choice(rng, "choice_color", "attribute", f"What color is the {thing.noun}?", thing.color, wrong)


def choice_where(shown: Scene, rng: np.random.Generator) -> Question | None:
    things = [t for t in shown.objects if t.clear]
    if not things:
        return None
    thing = pick(rng, things)
    wrong = [p for p in PLACES if p != thing.place]
    return choice(rng, "choice_where", "localization", f"Where in the image is the {thing.noun}?", thing.place, wrong)


def choice_word(shown: Scene, rng: np.random.Generator) -> Question | None:
    if not shown.signs:
        return None
    present = [t.noun for t in shown.signs]
    wrong = some(rng, [w for w in SIGNS if w not in present], 3)
    return choice(rng, "choice_word", "reading", "Which word is in the image?", pick(rng, present), wrong)


def _among(shown: Scene, rng: np.random.Generator, things: Sequence[Thing]) -> tuple[Thing, list[str]] | None:
    """One of the things and three wrong nouns, from the scene itself as far as it reaches."""
    if not things:
        return None
    thing = pick(rng, things)
    wrong = some(rng, [t.noun for t in shown.objects if t is not thing], 3)
    return thing, wrong + absent(shown, rng, "random", 3 - len(wrong))


def choice_object(shown: Scene, rng: np.random.Generator) -> Question | None:
    choices = _among(shown, rng, unique(shown.objects, lambda t: t.color))
    if choices is None:
        return None
    thing, wrong = choices
    return choice(rng, "choice_object", "attribute", f"Which object is {thing.color}?", thing.noun, wrong)


def hint_color(shown: Scene, rng: np.random.Generator) -> Question | None:
    """The context names the color that is wanted; without it the question has no answer."""
    choices = _among(shown, rng, unique(shown.objects, lambda t: t.color))
    if choices is None:
        return None
    who, (thing, wrong) = pick(rng, NAMES), choices
    hint = f"{who} is looking for something {thing.color}."
    return choice(rng, "hint_color", "color", f"Which object does {who} want?", thing.noun, wrong, hint)


def hint_place(shown: Scene, rng: np.random.Generator) -> Question | None:
    choices = _among(shown, rng, alone(shown))
    if choices is None:
        return None
    who, (thing, wrong) = pick(rng, NAMES), choices
    hint = f"{who} is looking for something in the {thing.place}."
    return choice(rng, "hint_place", "place", f"Which object does {who} want?", thing.noun, wrong, hint)


def hint_like(shown: Scene, rng: np.random.Generator) -> Question | None:
    """The context names a thing; the wanted one has its color."""
    pairs = twins(shown)
    if not pairs:
        return None
    a, b = pick(rng, pairs)
    wrong = some(rng, [t.noun for t in shown.objects if t not in (a, b)], 3)
    wrong += absent(shown, rng, "random", 3 - len(wrong))
    who = pick(rng, NAMES)
    hint = f"{who} is looking for something with the color of the {a.noun}."
    return choice(rng, "hint_like", "color", f"Which object does {who} want?", b.noun, wrong, hint)
