"""Open questions about one fact of a scene (two for a relation), balanced so that a blind guess earns little."""

from __future__ import annotations

import numpy as np
from prunekit_evals.micro.compose import Scene, Thing
from prunekit_evals.micro.lexicon import COLOR_NAMES, HEIGHTS, SIDES, SIGNS, with_article
from prunekit_evals.micro.question import Question, absent, alone, pick, unique


def existence(shown: Scene, rng: np.random.Generator, yes: bool | None = None, category: str = "") -> Question | None:
    yes = bool(rng.integers(2)) if yes is None else yes
    category = category or pick(rng, ("random", "popular", "adversarial"))
    nouns = [pick(rng, shown.objects).noun] if yes else absent(shown, rng, category)
    if not nouns:
        return None
    text = f"Is there {with_article(nouns[0])} in {pick(rng, ('the', 'the', 'this'))} image?"
    return Question("existence", category, text, "Yes" if yes else "No")


def color(shown: Scene, rng: np.random.Generator) -> Question:
    thing = pick(rng, shown.objects)
    return Question("color", "color", f"What color is the {thing.noun}?", thing.color)


def object_by_color(shown: Scene, rng: np.random.Generator) -> Question | None:
    things = unique(shown.objects, lambda t: t.color)
    if not things:
        return None
    thing = pick(rng, things)
    return Question("object_by_color", "object", f"Which object is {thing.color}?", thing.noun)


def object_by_place(shown: Scene, rng: np.random.Generator) -> Question | None:
    things = alone(shown)
    if not things:
        return None
    thing = pick(rng, things)
    return Question("object_by_place", "object", f"Which object is in the {thing.place} of the image?", thing.noun)


def where(shown: Scene, rng: np.random.Generator) -> Question | None:
    things = [t for t in shown.objects if t.clear]
    if not things:
        return None
    thing = pick(rng, things)
    return Question("where", "place", f"Where in the image is the {thing.noun}?", thing.place)


def _apart(shown: Scene, rng: np.random.Generator) -> tuple[Thing, Thing, str] | None:
    """Two things on different sides, or at different heights, beyond doubt, and which of the two it is."""
    axis = pick(rng, ("side", "height"))
    things = [t for t in shown.objects if t.clear]
    pairs = [(a, b) for a in things for b in things if getattr(a, axis) != getattr(b, axis)]
    return (*pick(rng, pairs), axis) if pairs else None


def relation(shown: Scene, rng: np.random.Generator) -> Question | None:
    pair = _apart(shown, rng)
    if pair is None:
        return None
    a, b, axis = pair
    if axis == "side":
        text, answer = f"Is the {a.noun} to the left or to the right of the {b.noun}?", a.side
    else:
        text = f"Is the {a.noun} above or below the {b.noun}?"
        answer = "above" if a.height == "top" else "below"
    return Question("relation", axis, text, answer)


def verify_color(shown: Scene, rng: np.random.Generator, yes: bool | None = None) -> Question:
    """Half of the wrong colors are worn by another thing of the scene, so both must be read together."""
    yes = bool(rng.integers(2)) if yes is None else yes
    thing = pick(rng, shown.objects)
    others = [t.color for t in shown.objects if t.color != thing.color]
    wrong = others if others and rng.integers(2) else [c for c in COLOR_NAMES if c != thing.color]
    hue = thing.color if yes else pick(rng, wrong)
    return Question("verify_color", "color", f"Is the {thing.noun} {hue}?", "Yes" if yes else "No")


def verify_place(shown: Scene, rng: np.random.Generator, yes: bool | None = None) -> Question | None:
    yes = bool(rng.integers(2)) if yes is None else yes
    things = [t for t in shown.objects if t.clear]
    if not things:
        return None
    thing = pick(rng, things)
    words, truth = pick(rng, ((SIDES, thing.side), (HEIGHTS, thing.height)))
    named = truth if yes else next(w for w in words if w != truth)
    text = f"Is the {thing.noun} in the {named} half of the image?"
    return Question("verify_place", "position", text, "Yes" if yes else "No")


def verify_word(shown: Scene, rng: np.random.Generator, yes: bool | None = None) -> Question | None:
    yes = bool(rng.integers(2)) if yes is None else yes
    if not shown.signs:
        return None
    present = [t.noun for t in shown.signs]
    word = pick(rng, present) if yes else pick(rng, [w for w in SIGNS if w not in present])
    return Question("verify_word", "OCR", f"Is the word {word} in the image?", "Yes" if yes else "No")


def read(shown: Scene, rng: np.random.Generator) -> Question | None:
    """What a sign says; where there are two, its color says which."""
    if not shown.signs:
        return None
    sign = pick(rng, shown.signs)
    if len(shown.signs) == 1 and rng.integers(2):
        return Question("read", "only", "What is written on the sign?", sign.noun)
    return Question("read", "by_color", f"What does the {sign.color} sign say?", sign.noun)


def sign_color(shown: Scene, rng: np.random.Generator) -> Question | None:
    if not shown.signs:
        return None
    sign = pick(rng, shown.signs)
    return Question("sign_color", "color", f"What color is the sign that says {sign.noun}?", sign.color)
