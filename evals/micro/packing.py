"""Question rows as token ids: many questions of many scenes packed after their shared image prefixes."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from prunekit_evals.micro import prompts
from prunekit_evals.micro.compose import Scene
from prunekit_evals.micro.questions import CHOICE, HOPS, OPEN, Question, ask
from torch import Tensor
from transformers import PreTrainedTokenizerFast

IGNORE = -100

OPEN_SHARES = {
    "existence": 0.19, "color": 0.1, "object_by_color": 0.1, "object_by_place": 0.08, "where": 0.1, "relation": 0.06,
    "verify_color": 0.11, "verify_place": 0.07, "verify_word": 0.05, "read": 0.09, "sign_color": 0.05,
}  # fmt: skip
HOP_SHARES = {"same_color": 0.27, "kind_by_color": 0.13, "read_like": 0.15, "where_same": 0.22, "kind_same": 0.23}
CHOICE_SHARES = {
    "choice_existence": 0.13, "choice_color": 0.14, "choice_where": 0.14, "choice_word": 0.09, "choice_object": 0.16,
    "hint_color": 0.14, "hint_place": 0.1, "hint_like": 0.1,
}  # fmt: skip
# Once names and colors are read, what is left to learn is places, comparing and the letters.
LATE_OPEN_SHARES = {
    "existence": 0.07, "color": 0.05, "object_by_color": 0.05, "object_by_place": 0.04, "where": 0.19, "relation": 0.12,
    "verify_color": 0.15, "verify_place": 0.1, "verify_word": 0.08, "read": 0.11, "sign_color": 0.04,
}  # fmt: skip
SHARES = (OPEN_SHARES, HOP_SHARES, CHOICE_SHARES)
LATE_SHARES = (LATE_OPEN_SHARES, HOP_SHARES, CHOICE_SHARES)
TRIES = 20  # a scene that admits no question of a group is asked others

Row = tuple[list[int], list[int]]  # token ids and labels of one question


@dataclass(frozen=True)
class Packed:
    """Rows of one batch: `ids` and `labels` int64 `[B, sum(count * length)]`, groups as in `Layout`.

    `labels` hold the answer and the end token at the positions that predict them, `IGNORE` elsewhere.
    `families[b]` names the family of every question of scene `b`, in row order.
    """

    ids: Tensor
    labels: Tensor
    groups: tuple[tuple[int, int], ...]
    families: list[list[str]]


class Packer:
    """Draws the questions of a training step and tokenises them."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.pad = tokenizer.pad_token_id
        self.prefix = tokenizer("USER: ")["input_ids"]  # with the start token; the image follows
        self._ids = functools.lru_cache(maxsize=100_000)(self._encode)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def row(self, question: Question, prompt: str) -> Row:
        """Token ids of one question with its answer, and the labels at the positions that predict it."""
        asked = self._ids(f"\n{prompt} ASSISTANT:")
        answer = self._ids(f" {question.answer}{self.tokenizer.eos_token}")
        ids = [*asked, *answer]
        return ids, [IGNORE] * (len(asked) - 1) + answer + [IGNORE]

    def _prompt(self, question: Question, rng: np.random.Generator) -> str:
        if question.choices:
            return prompts.mmbench(question) if rng.random() < 0.45 else prompts.scienceqa(question)
        return prompts.word(question) if rng.random() < 0.75 else prompts.bare(question)

    def group(self, asked: Sequence[Sequence[Question]], rng: np.random.Generator) -> Packed:
        """As many questions for every scene, padded to the longest."""
        rows = [[self.row(q, self._prompt(q, rng)) for q in questions] for questions in asked]
        length = max(len(ids) for row in rows for ids, _ in row)
        ids = np.full((len(rows), len(rows[0]), length), self.pad, np.int64)
        labels = np.full_like(ids, IGNORE)
        for b, row in enumerate(rows):
            for i, (tokens, targets) in enumerate(row):
                ids[b, i, : len(tokens)], labels[b, i, : len(tokens)] = tokens, targets
        flat = [torch.from_numpy(x.reshape(len(rows), -1)) for x in (ids, labels)]
        return Packed(*flat, ((len(rows[0]), length),), [[q.family for q in questions] for questions in asked])

    def pack(self, scenes: list[Scene], rng: np.random.Generator, *counts: int, late: bool = False) -> Packed:
        """For every scene so many questions of one fact, of several hops and with choices; `late` ones are harder."""
        parts = [
            self.group([_draw(shown, rng, shares, count) for shown in scenes], rng)
            for shares, count in zip(LATE_SHARES if late else SHARES, counts, strict=True)
            if count
        ]
        return Packed(
            torch.cat([p.ids for p in parts], 1),
            torch.cat([p.labels for p in parts], 1),
            tuple(g for p in parts for g in p.groups),
            [list(itertools.chain(*rows)) for rows in zip(*(p.families for p in parts), strict=True)],
        )


def pixels(scenes: list[Scene], dtype: torch.dtype) -> Tensor:
    """Normalised images `[B, 3, 168, 168]`, as the shipped image processor makes them (mean and std 0.5)."""
    images = torch.from_numpy(np.stack([s.image for s in scenes])).permute(0, 3, 1, 2)
    return (images.float() / 127.5 - 1).to(dtype)


def _draw(shown: Scene, rng: np.random.Generator, shares: dict[str, float], count: int) -> list[Question]:
    names, weights = list(shares), np.cumsum(list(shares.values()))
    asked: list[Question] = []
    for _ in range(TRIES * count):
        family = names[min(int(np.searchsorted(weights, rng.random() * weights[-1], "right")), len(names) - 1)]
        question = ask(shown, rng, family)
        if question is not None:
            asked.append(question)
        if len(asked) == count:
            return asked
    while len(asked) < count:
        question = ask(shown, rng, "existence")
        asked += [question] if question else []
    return asked


assert set(OPEN_SHARES) == set(LATE_OPEN_SHARES) == set(OPEN)
assert set(HOP_SHARES) == set(HOPS) and set(CHOICE_SHARES) == set(CHOICE)
