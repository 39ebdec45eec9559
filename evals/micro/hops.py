"""Open questions of two and three hops: each answer goes through a thing that the question does not name."""

from __future__ import annotations

import numpy as np
from prunekit_evals.micro.compose import Scene
from prunekit_evals.micro.lexicon import THEME_OF
from prunekit_evals.micro.question import Question, pick, twins, unique


def same_color(shown: Scene, rng: np.random.Generator) -> Question | None:
    """Two hops: the named thing's color, then the other thing of that color."""
    pairs = twins(shown)
    if not pairs:
        return None
    a, b = pick(rng, pairs)
    return Question("same_color", "two", f"Which object has the same color as the {a.noun}?", b.noun)


def kind_by_color(shown: Scene, rng: np.random.Generator) -> Question | None:
    """Two hops: the thing of the color, then what kind of thing it is."""
    things = unique(shown.objects, lambda t: t.color)
    if not things:
        return None
    thing = pick(rng, things)
    return Question("kind_by_color", "two", f"What kind of object is {thing.color}?", THEME_OF[thing.noun])


def read_like(shown: Scene, rng: np.random.Generator) -> Question | None:
    """Two hops: the named thing's color, then what the one of two signs in that color says."""
    if len(shown.signs) < 2:
        return None
    pairs = [(t, s) for t in shown.objects for s in shown.signs if t.color == s.color]
    if not pairs:
        return None
    thing, sign = pick(rng, pairs)
    text = f"What does the sign in the color of the {thing.noun} say?"
    return Question("read_like", "two", text, sign.noun)


def where_same(shown: Scene, rng: np.random.Generator) -> Question | None:
    """Three hops: the named thing's color, the other thing of that color, its place."""
    pairs = [(a, b) for a, b in twins(shown) if b.clear]
    if not pairs:
        return None
    a, b = pick(rng, pairs)
    text = f"Where in the image is the object with the same color as the {a.noun}?"
    return Question("where_same", "three", text, b.place)


def kind_same(shown: Scene, rng: np.random.Generator) -> Question | None:
    """Three hops: the named thing's color, the other thing of that color, what kind of thing that is."""
    pairs = twins(shown)
    if not pairs:
        return None
    a, b = pick(rng, pairs)
    text = f"What kind of object has the same color as the {a.noun}?"
    return Question("kind_same", "three", text, THEME_OF[b.noun])
