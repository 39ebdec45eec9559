"""All families of questions about a scene, by name."""

from __future__ import annotations

import numpy as np
from prunekit_evals.micro import choices, facts, hops
from prunekit_evals.micro.compose import Scene
from prunekit_evals.micro.question import LETTERS, Question

OPEN = {
    f.__name__: f
    for f in (
        facts.existence, facts.color, facts.object_by_color, facts.object_by_place, facts.where, facts.relation,
        facts.verify_color, facts.verify_place, facts.verify_word, facts.read, facts.sign_color,
    )
}  # fmt: skip
HOPS = {f.__name__: f for f in (hops.same_color, hops.kind_by_color, hops.read_like, hops.where_same, hops.kind_same)}
CHOICE = {
    f.__name__: f
    for f in (
        choices.choice_existence, choices.choice_color, choices.choice_where, choices.choice_word,
        choices.choice_object, choices.hint_color, choices.hint_place, choices.hint_like,
    )
}  # fmt: skip
FAMILIES = OPEN | HOPS | CHOICE

__all__ = ["CHOICE", "FAMILIES", "HOPS", "LETTERS", "OPEN", "Question", "ask", "questions"]


def ask(shown: Scene, rng: np.random.Generator, family: str) -> Question | None:
    """A question of the family, or None where this scene admits none."""
    return FAMILIES[family](shown, rng)


def questions(shown: Scene, per_family: int = 1) -> list[Question]:
    """Questions of every family that the scene admits; a function of the scene's seed alone."""
    rng = np.random.default_rng([shown.seed, 1])
    asked = [ask(shown, rng, family) for family in FAMILIES for _ in range(per_family)]
    return [q for q in asked if q is not None]
