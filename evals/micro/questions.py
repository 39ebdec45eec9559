"""Questions about a scene, family by family, with answers balanced so that a blind guess earns little."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .compose import Scene, Thing, draw_nouns
from .lexicon import COLOR_NAMES, HEIGHTS, NOUNS, PLACES, POPULAR, SIDES, THEME_OF, THEMES, with_article

LETTERS = "ABCD"
NAMES = ("Mia", "Leo", "Anna", "Tom")


@dataclass(frozen=True)
class Question:
    """A bare question (no instruction, no options in ``text``) and its answer.

    ``answer`` is ``Yes`` / ``No``, a word or two, or, where there are ``choices``, the letter of the right one.
    """

    family: str
    category: str
    text: str
    answer: str
    choices: tuple[str, ...] = ()
    hint: str = ""


def _pick(rng: np.random.Generator, items: tuple | list):
    return items[int(rng.integers(len(items)))]


def _shuffled(rng: np.random.Generator, right: str, wrong: list[str]) -> tuple[tuple[str, ...], str]:
    """Four choices in random order and the letter of the right one."""
    order = rng.permutation(4)
    options = [right, *wrong]
    choices = tuple(options[i] for i in order)
    return choices, LETTERS[choices.index(right)]


def _choice(rng: np.random.Generator, family: str, category: str, text: str, right: str, wrong: list[str],
            hint: str = "") -> Question:  # fmt: skip
    choices, letter = _shuffled(rng, right, wrong)
    return Question(family, category, text, letter, choices, hint)


def _absent(shown: Scene, rng: np.random.Generator, category: str, count: int = 1) -> list[str]:
    """Nouns that are not in the scene: any, popular ones, or (adversarial) ones of the scene's own theme."""
    pool = {"random": NOUNS, "popular": POPULAR, "adversarial": tuple(THEMES[shown.theme])}[category]
    present = {t.noun for t in shown.objects}
    free = [n for n in pool if n not in present]
    return [free[i] for i in rng.permutation(len(free))[:count]]


def _unique(shown: Scene, of: Callable[[Thing], str]) -> list[Thing]:
    """The things whose color (or place) no other thing of the scene shares."""
    values = [of(t) for t in shown.objects]
    return [t for t, v in zip(shown.objects, values, strict=True) if values.count(v) == 1]


def existence(shown: Scene, rng: np.random.Generator, yes: bool | None = None, category: str = "") -> Question:
    yes = bool(rng.integers(2)) if yes is None else yes
    category = category or _pick(rng, ("random", "popular", "adversarial"))
    noun = _pick(rng, shown.objects).noun if yes else _absent(shown, rng, category)[0]
    text = f"Is there {with_article(noun)} in {_pick(rng, ('the', 'the', 'this'))} image?"
    return Question("existence", category, text, "Yes" if yes else "No")


def color(shown: Scene, rng: np.random.Generator) -> Question:
    thing = _pick(rng, shown.objects)
    return Question("color", "color", f"What color is the {thing.noun}?", thing.color)


def object_by_color(shown: Scene, rng: np.random.Generator) -> Question | None:
    things = _unique(shown, lambda t: t.color)
    if not things:
        return None
    thing = _pick(rng, things)
    return Question("object_by_color", "object", f"Which object is {thing.color}?", thing.noun)


def object_by_place(shown: Scene, rng: np.random.Generator) -> Question | None:
    things = _unique(shown, lambda t: t.place)
    if not things:
        return None
    thing = _pick(rng, things)
    return Question("object_by_place", "object", f"What is in the {thing.place} of the image?", thing.noun)


def where(shown: Scene, rng: np.random.Generator) -> Question:
    thing = _pick(rng, shown.objects)
    return Question("where", "place", f"Where in the image is the {thing.noun}?", thing.place)


def _apart(shown: Scene, rng: np.random.Generator) -> tuple[Thing, Thing, str] | None:
    """Two things on different sides, or at different heights, and which of the two it is."""
    axis = _pick(rng, ("side", "height"))
    pairs = [(a, b) for a in shown.objects for b in shown.objects if getattr(a, axis) != getattr(b, axis)]
    return (*_pick(rng, pairs), axis) if pairs else None


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
    thing = _pick(rng, shown.objects)
    others = [t.color for t in shown.objects if t.color != thing.color]
    wrong = others if others and rng.integers(2) else [c for c in COLOR_NAMES if c != thing.color]
    hue = thing.color if yes else _pick(rng, wrong)
    return Question("verify_color", "color", f"Is the {thing.noun} {hue}?", "Yes" if yes else "No")


def verify_place(shown: Scene, rng: np.random.Generator, yes: bool | None = None) -> Question:
    yes = bool(rng.integers(2)) if yes is None else yes
    thing = _pick(rng, shown.objects)
    words, truth = _pick(rng, ((SIDES, thing.side), (HEIGHTS, thing.height)))
    named = truth if yes else next(w for w in words if w != truth)
    text = f"Is the {thing.noun} in the {named} half of the image?"
    return Question("verify_place", "position", text, "Yes" if yes else "No")


def choice_existence(shown: Scene, rng: np.random.Generator) -> Question:
    """One noun of the scene among three that are absent but drawn by the scenes' own law."""
    thing = _pick(rng, shown.objects)
    present = {t.noun for t in shown.objects}
    wrong = [n for n in draw_nouns(rng, shown.theme, 9) if n not in present][:3]
    return _choice(rng, "choice_existence", "identity", "Which object is in the image?", thing.noun, wrong)


def choice_color(shown: Scene, rng: np.random.Generator) -> Question:
    thing = _pick(rng, shown.objects)
    others = [c for c in COLOR_NAMES if c != thing.color]
    wrong = [others[i] for i in rng.permutation(len(others))[:3]]
    return _choice(rng, "choice_color", "attribute", f"What color is the {thing.noun}?", thing.color, wrong)


def choice_where(shown: Scene, rng: np.random.Generator) -> Question:
    thing = _pick(rng, shown.objects)
    wrong = [p for p in PLACES if p != thing.place]
    text = f"Where in the image is the {thing.noun}?"
    return _choice(rng, "choice_where", "localization", text, thing.place, wrong)


def _among_shown(shown: Scene, rng: np.random.Generator, things: list[Thing], of: Callable[[Thing], str]):
    """A thing of unique ``of`` and three wrong nouns, from the scene itself as far as it reaches."""
    if not things:
        return None
    thing = _pick(rng, things)
    others = [t.noun for t in shown.objects if of(t) != of(thing)]
    wrong = [others[i] for i in rng.permutation(len(others))[:3]]
    return thing, wrong + _absent(shown, rng, "random", 3 - len(wrong)) if len(wrong) < 3 else wrong


def choice_object(shown: Scene, rng: np.random.Generator) -> Question | None:
    found = _among_shown(shown, rng, _unique(shown, lambda t: t.color), lambda t: t.color)
    if found is None:
        return None
    thing, wrong = found
    return _choice(rng, "choice_object", "attribute", f"Which object is {thing.color}?", thing.noun, wrong)


def hint_color(shown: Scene, rng: np.random.Generator) -> Question | None:
    """The context names the color that is wanted; without it the question has no answer."""
    found = _among_shown(shown, rng, _unique(shown, lambda t: t.color), lambda t: t.color)
    if found is None:
        return None
    who, (thing, wrong) = _pick(rng, NAMES), found
    hint = f"{who} is looking for something {thing.color}."
    text = f"Which object does {who} want?"
    return _choice(rng, "hint_color", "color", text, thing.noun, wrong, hint)


def hint_place(shown: Scene, rng: np.random.Generator) -> Question | None:
    found = _among_shown(shown, rng, _unique(shown, lambda t: t.place), lambda t: t.place)
    if found is None:
        return None
    who, (thing, wrong) = _pick(rng, NAMES), found
    hint = f"{who} is looking for something in the {thing.place}."
    text = f"Which object does {who} want?"
    return _choice(rng, "hint_place", "place", text, thing.noun, wrong, hint)


def hint_theme(shown: Scene, rng: np.random.Generator) -> Question | None:
    """Of the wanted kind and in the picture: wrong choices fail one of the two, so both must be used."""
    thing = _pick(rng, shown.objects)
    theme = THEME_OF[thing.noun]
    present = [t.noun for t in shown.objects if THEME_OF[t.noun] != theme]
    names = {t.noun for t in shown.objects}
    kin = [n for n in THEMES[theme] if n not in names]
    if not present:
        return None
    wrong = [_pick(rng, present)]
    wrong += [kin[i] for i in rng.permutation(len(kin))[:1]]
    wrong += [n for n in _absent(shown, rng, "random", 8) if n not in wrong and THEME_OF[n] != theme][:1]
    if len(wrong) < 3:
        return None
    who = _pick(rng, NAMES)
    hint = f"{who} is looking for {with_article(theme)} in the image."
    return _choice(rng, "hint_theme", "theme", f"Which object does {who} want?", thing.noun, wrong, hint)


OPEN = {
    f.__name__: f
    for f in (existence, color, object_by_color, object_by_place, where, relation, verify_color, verify_place)
}
CHOICE = {
    f.__name__: f
    for f in (choice_existence, choice_color, choice_where, choice_object, hint_color, hint_place, hint_theme)
}
FAMILIES = OPEN | CHOICE


def ask(shown: Scene, rng: np.random.Generator, family: str) -> Question | None:
    """A question of the family, or None where this scene admits none."""
    return FAMILIES[family](shown, rng)


def questions(shown: Scene, per_family: int = 1) -> list[Question]:
    """Questions of every family that the scene admits; a function of the scene's seed alone."""
    rng = np.random.default_rng([shown.seed, 1])
    asked = [ask(shown, rng, family) for family in FAMILIES for _ in range(per_family)]
    return [q for q in asked if q is not None]
