"""Question rows: token ids and labels of prompts with their answers, captions, and letters bound to options.

A prompt is `Image:<image>` and a row is what follows: a line break, the question, `Answer:` on a line of its own, and
the answer with a leading space and the end token.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from prunekit_evals.micro import prompts
from prunekit_evals.micro.compose import Scene
from prunekit_evals.micro.lexicon import COLOR_NAMES, NOUNS, PLACES, SIGNS
from prunekit_evals.micro.question import LETTERS, Question, choice, pick, some
from prunekit_evals.micro.questions import CHOICE, FAMILIES, HOPS, OPEN, ask
from prunekit_evals.smol.base import END_ID
from tokenizers import Tokenizer

LEAD, TAIL = "Image:", "\nAnswer:"
DESCRIBE = "Describe the image."
IGNORE, PAD = -100, 0
KINDS: tuple[str, ...] = (*FAMILIES, "caption", "bind", "told")  # what a row may be of
CHOICE_SHARES = {
    "choice_existence": 0.12, "choice_color": 0.16, "choice_where": 0.16, "choice_word": 0.1, "choice_object": 0.14,
    "hint_color": 0.12, "hint_place": 0.1, "hint_like": 0.1,
}  # fmt: skip
EASY_SHARES = {
    "existence": 0.25, "color": 0.25, "where": 0.2, "object_by_color": 0.12, "object_by_place": 0.08, "read": 0.1,
}  # fmt: skip
# The harder a family was to learn for the smaller model (`docs/decisions/micro-third-recipe.md`), the larger its share.
LATE_SHARES = {
    "existence": 0.08, "color": 0.05, "object_by_color": 0.05, "object_by_place": 0.05, "where": 0.07, "relation": 0.06,
    "verify_color": 0.07, "verify_place": 0.06, "verify_word": 0.05, "read": 0.07, "sign_color": 0.03,
    "same_color": 0.08, "kind_by_color": 0.05, "read_like": 0.06, "where_same": 0.09, "kind_same": 0.08,
}  # fmt: skip
LEVELS = 5  # of the text-only curriculum


@dataclass(frozen=True)
class Row:
    """A prompt's text after the image, the answer, and the kind."""

    prompt: str
    answer: str
    kind: str


@dataclass(frozen=True)
class Rows:
    """Rows of a batch, one group after another: ids, labels int32 `[B, S]`, kinds int8 `[B, rows]`.

    Labels stand where they are predicted, `IGNORE` elsewhere. groups: (rows, padded length) as in `decoder`.
    """

    ids: np.ndarray
    labels: np.ndarray
    kinds: np.ndarray
    groups: tuple[tuple[int, int], ...]


class Encoder:
    """Texts to rows of ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._encode = functools.lru_cache(maxsize=200_000)(
            lambda text: tuple(tokenizer.encode(text, add_special_tokens=False).ids)
        )
        self.lead = list(self._encode(LEAD))

    def row(self, row: Row) -> tuple[list[int], list[int]]:
        asked = self._encode(f"\n{row.prompt}{TAIL}")
        answer = [*self._encode(f" {row.answer}"), END_ID]
        return [*asked, *answer], [IGNORE] * (len(asked) - 1) + answer + [IGNORE]

    def rows(self, parts: Sequence[Sequence[Sequence[Row]]]) -> Rows:
        """`parts`: for each group, for each scene, its rows (as many for every scene)."""
        ids, labels, groups = [], [], []
        for scenes in parts:
            made = [[self.row(row) for row in rows] for rows in scenes]
            longest = max(len(one) for rows in made for one, _ in rows)
            length = -(-longest // 8) * 8  # few distinct shapes keep the allocator's cache useful
            shape = (len(made), len(made[0]), length)
            group_ids, group_labels = np.full(shape, PAD, np.int32), np.full(shape, IGNORE, np.int32)
            for b, rows in enumerate(made):
                for i, (one, target) in enumerate(rows):
                    group_ids[b, i, : len(one)], group_labels[b, i, : len(one)] = one, target
            ids.append(group_ids.reshape(len(made), -1))
            labels.append(group_labels.reshape(len(made), -1))
            groups.append(shape[1:])
        kinds = [[KINDS.index(row.kind) for rows in scene for row in rows] for scene in zip(*parts, strict=True)]
        return Rows(np.concatenate(ids, 1), np.concatenate(labels, 1), np.array(kinds, np.int8), tuple(groups))


def worded(question: Question, rng: np.random.Generator | None = None, short: float = 0.0) -> Row:
    """A question as the benchmark asks it; a share `short` without the instruction. None: the family's own task."""
    if question.choices:
        hinted = bool(question.hint) if rng is None else rng.random() < 0.5
        text = prompts.scienceqa(question) if hinted else prompts.mmbench(question)
        return Row(text, question.answer, question.family)
    bare = rng is not None and rng.random() < short
    return Row(question.text if bare else prompts.word(question), question.answer, question.family)


def drawn(shown: Scene, rng: np.random.Generator, shares: Mapping[str, float], count: int, short: float) -> list[Row]:
    names, weights = list(shares), np.array(list(shares.values()))
    found: list[Row] = []
    for i in rng.choice(len(names), 8 * count, p=weights / weights.sum()):
        question = ask(shown, rng, names[i])
        if question is not None:
            found.append(worded(question, rng, short))
        if len(found) == count:
            return found
    fallback: Callable[..., Question | None] = CHOICE["choice_color"] if set(shares) <= set(CHOICE) else OPEN["color"]
    while len(found) < count:
        question = fallback(shown, rng)
        found += [worded(question, rng, short)] if question else []
    return found


def told(shown: Scene, rng: np.random.Generator) -> str:
    """All things of a scene in random order: "dog red top left, sign tea blue bottom right"."""
    signs = {t.noun for t in shown.signs}
    things = [shown.things[i] for i in rng.permutation(len(shown.things))]
    return ", ".join(f"{'sign ' * (t.noun in signs)}{t.noun} {t.color} {t.place}" for t in things)


def captions(shown: Scene, rng: np.random.Generator, count: int) -> list[Row]:
    return [Row(DESCRIBE, told(shown, rng), "caption") for _ in range(count)]


def bound(shown: Scene, rng: np.random.Generator, level: int) -> Row:
    """Text alone: the letter of an option by its text (levels 0 to 2), then of a fact that a text tells (3, 4)."""
    if level >= 3:
        families = ("choice_color", "choice_where", "choice_existence", "choice_object", "choice_word")
        if level == 4:
            families = (*CHOICE, *HOPS, "color", "where", "relation", "verify_color", "verify_place")
        asked = None
        while asked is None:
            asked = ask(shown, rng, pick(rng, families))
        row = worded(asked, rng)
        return Row(f"Objects: {told(shown, rng)}\n{row.prompt}", row.answer, "told")
    words = some(rng, pick(rng, (NOUNS, COLOR_NAMES, PLACES, SIGNS)), 4)
    question = choice(rng, "choice_word", "", f"Which option is {words[0]}?", words[0], words[1:])
    if level == 2:
        return Row(worded(question, rng).prompt, question.answer, "bind")
    options = [w for w in question.choices if level == 1 or w in words[:2]]
    lines = "\n".join(f"{letter}. {w}" for letter, w in zip(LETTERS, options, strict=False))
    return Row(f"{lines}\nThe letter of {words[0]} is", LETTERS[options.index(words[0])], "bind")


def easy(shown: Scene, rng: np.random.Generator) -> list[list[Row]]:
    return [drawn(shown, rng, EASY_SHARES, 6, 0.7), captions(shown, rng, 2)]


def letters(shown: Scene, rng: np.random.Generator, level: int, count: int) -> list[list[Row]]:
    """Of texts alone. Levels already mastered come back in a third of the rows."""
    levels = [level if rng.random() < 0.67 else int(rng.integers(level + 1)) for _ in range(count)]
    return [[bound(shown, rng, one) for one in levels]]


def late(shown: Scene, rng: np.random.Generator) -> list[list[Row]]:
    return [
        drawn(shown, rng, LATE_SHARES, 8, 0.2), drawn(shown, rng, CHOICE_SHARES, 4, 0.0), captions(shown, rng, 1),
    ]  # fmt: skip


def every(shown: Scene, rng: np.random.Generator, families: Iterable[str]) -> list[Row]:
    """A question of every family as the benchmark asks it; where the scene admits none, one of kind "caption"."""
    asked = {family: ask(shown, rng, family) for family in families}
    return [worded(q) if q else Row(DESCRIBE, "nothing", "caption") for q in asked.values()]


def checks(shown: Scene) -> list[list[Row]]:
    """The held-out questions: a group of open families and one of choices."""
    rng = np.random.default_rng([shown.seed, 11])
    return [every(shown, rng, OPEN | HOPS), every(shown, rng, CHOICE)]
