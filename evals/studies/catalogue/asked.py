"""Questions of the bundled benchmark, and what a pipeline answers to them: the engine runs, nothing is simulated.

Images go through the vision tower once and are shown to every pipeline, which changes no answer as long as none cuts
inside the tower (a test compares).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from prunekit_evals.micro import prompts
from prunekit_evals.micro.benchmark import ITEMS, Item
from prunekit_evals.micro.compose import scene
from prunekit_evals.micro.question import Question
from prunekit_evals.micro.questions import CHOICE, HOPS, OPEN, ask
from prunekit_evals.run.answering import Loaded, encode
from prunekit_evals.run.prompts import from_messages, render

import prunekit
from prunekit.pipeline.build import Pipeline

DRAWN = 600  # of each task; `prunekit eval --limit n` asks the first n of the same ones
BATCH = 50
CALIBRATION = 1 << 51  # scenes that neither the model, nor a router, nor the benchmark has
# Encoded under a pipeline, features carry notes about their images, from which strategies draw their seeds.
TRACED = {"name": "traced", "stages": [{"use": "random", "at": "encoder", "keep": 0.5}]}


@dataclass(frozen=True)
class Outcome:
    """What a pipeline made of some questions.

    right: whether each was answered right. flops, kv: sums over the questions of prefill FLOPs and KV bytes, pruned and
    dense. kept: sum of the visual tokens left. decisions: FLOPs of the stages' own decisions.
    """

    right: tuple[bool, ...] = ()
    flops: tuple[int, int] = (0, 0)
    kv: tuple[int, int] = (0, 0)
    kept: int = 0
    decisions: int = 0

    def __add__(self, other: Outcome) -> Outcome:
        return Outcome(
            self.right + other.right,
            (self.flops[0] + other.flops[0], self.flops[1] + other.flops[1]),
            (self.kv[0] + other.kv[0], self.kv[1] + other.kv[1]),
            self.kept + other.kept,
            self.decisions + other.decisions,
        )


@dataclass(frozen=True)
class Batch:
    """Encoded prompts with their images' features, and the answers that count as right."""

    inputs: dict[str, Any]
    answers: tuple[str, ...]


def benchmark_items(task: str, count: int, first: int = 0) -> list[Item]:
    """Questions of a task of the bundled benchmark, from number `first` on."""
    return ITEMS[task](DRAWN)[first : first + count]


def calibration_items(count: int) -> list[Item]:
    """Questions of all families in turn, on scenes of their own, for whatever a baseline has to be tuned on."""
    families = [*OPEN, *HOPS, *CHOICE]
    items: list[Item] = []
    number = 0
    while len(items) < count:
        shown = scene(CALIBRATION + number)
        question = ask(shown, np.random.default_rng([number, 11]), families[len(items) % len(families)])
        number += 1
        if question is not None:
            items.append((shown, question))
    return items


def wording(question: Question, task: str | None) -> str:
    """The user's words; without a task, those of the tasks that ask such questions."""
    if task is not None:
        return prompts.BY_TASK[task](question)
    if not question.choices:
        return prompts.word(question)
    return prompts.scienceqa(question) if question.hint else prompts.mmbench(question)


def batches(loaded: Loaded, items: Sequence[Item], task: str | None, seen_once: bool = True) -> Iterator[Batch]:
    """The questions in batches, one image a question.

    seen_once: images are given as features, seen by the tower once; False: as pixels, for pipelines that cut or read
    the tower.
    """
    traced = prunekit.load(TRACED)
    for begin in range(0, len(items), BATCH):
        some = items[begin : begin + BATCH]
        asked = [_prompt(loaded, shown.image, wording(question, task)) for shown, question in some]
        encoded = encode(loaded, asked)
        answers = tuple(q.answer for _, q in some)
        if not seen_once:
            yield Batch(dict(encoded), answers)
            continue
        with torch.inference_mode(), prunekit.apply(loaded.model, traced, processor=loaded.processor):
            seen = loaded.model.get_image_features(pixel_values=encoded["pixel_values"])
        inputs = {name: encoded[name] for name in ("input_ids", "attention_mask")}
        yield Batch({**inputs, "mm_encoder_outputs": {"image": seen}}, answers)


def text_tokens(loaded: Loaded, text: str) -> int:
    """Tokens of a prompt with one image beside its visual ones; the image's placeholder is one token."""
    content = [{"type": "image"}, {"type": "text", "text": text}]
    whole = render(loaded.processor, [{"role": "user", "content": content}])
    tokenizer = loaded.processor.tokenizer
    begin = tokenizer.bos_token
    return len(tokenizer(whole, add_special_tokens=not (begin and whole.startswith(begin))).input_ids) - 1


def _prompt(loaded: Loaded, image: Any, text: str) -> Any:
    content = [{"type": "image", "url": Image.fromarray(np.asarray(image))}, {"type": "text", "text": text}]
    return from_messages([{"role": "user", "content": content}], loaded.processor, "")


def said(loaded: Loaded, pipeline: Pipeline, batch: Batch) -> tuple[list[str], Any]:
    """Greedy answers under a pipeline, and the run's report."""
    tokenizer = loaded.processor.tokenizer
    most = max(len(tokenizer(f" {answer}", add_special_tokens=False).input_ids) for answer in batch.answers) + 1
    with torch.inference_mode(), prunekit.apply(loaded.model, pipeline, processor=loaded.processor) as run:
        output = loaded.model.generate(
            **batch.inputs, max_new_tokens=most, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
        report = run.report
    new = output[:, batch.inputs["input_ids"].shape[1] :]
    return tokenizer.batch_decode(new, skip_special_tokens=True), report


def normal(text: str) -> str:
    """As the tasks compare: neither case, nor spaces around, nor a full stop counts."""
    return text.strip().rstrip(".").casefold()


def outcome(loaded: Loaded, pipeline: Pipeline, batch: Batch) -> Outcome:
    """Ask one batch."""
    texts, report = said(loaded, pipeline, batch)
    right = tuple(normal(text) == normal(answer) for text, answer in zip(texts, batch.answers, strict=True))
    cost = report.cost
    return Outcome(
        right,
        (sum(cost.prefill_flops), sum(cost.dense_prefill_flops)),
        (sum(cost.kv_bytes), sum(cost.dense_kv_bytes)),
        sum(report.kept_tokens),
        sum(cost.decision_flops),
    )
