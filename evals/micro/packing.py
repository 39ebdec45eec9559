"""Question rows as token ids: many questions of many scenes packed after their shared image prefixes."""

import functools
import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from . import prompts
from .compose import Scene
from .questions import CHOICE, OPEN, Question, ask

IGNORE = -100

OPEN_SHARES = {
    "existence": 0.24, "color": 0.13, "object_by_color": 0.12, "object_by_place": 0.11, "where": 0.11,
    "relation": 0.07, "verify_color": 0.13, "verify_place": 0.09,
}  # fmt: skip
CHOICE_SHARES = {
    "choice_existence": 0.2, "choice_color": 0.13, "choice_where": 0.13, "choice_object": 0.16,
    "hint_color": 0.14, "hint_place": 0.12, "hint_theme": 0.12,
}  # fmt: skip
# Once single facts are read, what is left to learn is matching them with the letters.
LATE_CHOICE_SHARES = {
    "choice_existence": 0.08, "choice_color": 0.16, "choice_where": 0.14, "choice_object": 0.2,
    "hint_color": 0.18, "hint_place": 0.16, "hint_theme": 0.08,
}  # fmt: skip


@dataclass(frozen=True)
class Packed:
    """Rows of one batch: ``ids`` and ``labels`` int64 ``[B, sum(count * length)]``, groups as in ``Layout``.

    ``labels`` hold the answer and the end token at the positions that predict them, ``IGNORE`` elsewhere.
    ``families[b]`` names the family of every question of scene ``b``, in row order.
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

    def row(self, question: Question, prompt: str) -> tuple[list[int], list[int]]:
        """Token ids of one question with its answer, and the labels at the positions that predict it."""
        asked = self._ids(f"\n{prompt} ASSISTANT:")
        answer = self._ids(f" {question.answer}{self.tokenizer.eos_token}")
        ids = [*asked, *answer]
        return ids, [IGNORE] * (len(asked) - 1) + answer + [IGNORE]

    def _prompt(self, question: Question, rng: np.random.Generator) -> str:
        if question.choices:
            return prompts.mmbench(question) if rng.random() < 0.45 else prompts.scienceqa(question)
        return prompts.word(question) if rng.random() < 0.75 else prompts.bare(question)

    def _group(self, scenes: list[Scene], rng: np.random.Generator, shares: dict[str, float], count: int) -> Packed:
        names, weights = list(shares), np.array(list(shares.values()))
        rows, families = [], []
        for shown in scenes:
            asked: list[Question] = []
            while len(asked) < count:
                question = ask(shown, rng, names[rng.choice(len(names), p=weights / weights.sum())])
                if question is not None:
                    asked.append(question)
            rows.append([self.row(q, self._prompt(q, rng)) for q in asked])
            families.append([q.family for q in asked])
        length = max(len(ids) for row in rows for ids, _ in row)
        ids = np.full((len(scenes), count, length), self.pad, np.int64)
        labels = np.full_like(ids, IGNORE)
        for b, row in enumerate(rows):
            for i, (tokens, targets) in enumerate(row):
                ids[b, i, : len(tokens)], labels[b, i, : len(tokens)] = tokens, targets
        flat = [torch.from_numpy(x.reshape(len(scenes), -1)) for x in (ids, labels)]
        return Packed(*flat, ((count, length),), families)

    def pack(
        self, scenes: list[Scene], rng: np.random.Generator, opened: int, chosen: int, late: bool = False
    ) -> Packed:
        """``opened`` open and ``chosen`` multiple-choice questions for every scene; ``late`` ones are harder."""
        choices = LATE_CHOICE_SHARES if late else CHOICE_SHARES
        parts = [
            self._group(scenes, rng, shares, count)
            for shares, count in ((OPEN_SHARES, opened), (choices, chosen))
            if count
        ]
        return Packed(
            torch.cat([p.ids for p in parts], 1),
            torch.cat([p.labels for p in parts], 1),
            tuple(g for p in parts for g in p.groups),
            [list(itertools.chain(*rows)) for rows in zip(*(p.families for p in parts), strict=True)],
        )


assert set(OPEN_SHARES) == set(OPEN) and set(CHOICE_SHARES) == set(LATE_CHOICE_SHARES) == set(CHOICE)
