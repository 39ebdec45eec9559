"""A conversation in rounds under one pipeline, on one cache as far as the rounds go on from one another.

A round whose prompt is all that was said before and more text, without a new image, goes on from the pruned cache: what
was dropped for the first question stays dropped, as in a chat. The engine continues such a cache exactly. Any other
round is a prompt of its own, which is pruned anew.
"""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from prunekit_evals.run.answering import Loaded, Tally, clock, encode, facts_of, written
from prunekit_evals.run.generation import Decoding
from prunekit_evals.run.journal import Answer
from prunekit_evals.run.prompts import Prompt

import prunekit
from prunekit.pipeline.build import Pipeline
from prunekit.upstream import CACHE


class Rounds:
    """One conversation. A context manager, inside of which `ask` is called for each round.

    continued: rounds that went on from the cache of the one before.
    """

    def __init__(self, loaded: Loaded, pipeline: Pipeline, tally: Tally) -> None:
        self.loaded, self.pipeline, self.tally = loaded, pipeline, tally
        self.continued = 0
        self._stack = ExitStack()
        self._shown: str | None = None
        self._prompt = 0  # tokens of the prompt that was pruned
        self._held: list[int] = []  # the tokens whose keys and values the cache holds, dropped ones included
        self._cache: Any = None

    def __enter__(self) -> Rounds:
        self._stack.enter_context(torch.inference_mode())
        model, processor = self.loaded.model, self.loaded.processor
        self._run = self._stack.enter_context(prunekit.apply(model, self.pipeline, processor=processor))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def ask(self, prompt: Prompt, how: Decoding) -> Answer:
        """Answer a round; the facts of one that goes on are None, as nothing is pruned in it."""
        inputs = encode(self.loaded, [prompt])
        ids: list[int] = inputs["input_ids"][0].tolist()
        shared = self._shared(prompt, ids, how)
        if shared and self._crop(len(self._held) - shared):
            self.continued += 1
            inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")} | {CACHE: self._cache}
        else:
            shared, self._cache, self._shown, self._prompt = 0, None, prompt.image_id, len(ids)
        start = clock(self.loaded)
        output = self.loaded.model.generate(
            **inputs, **dict(how.arguments), return_dict_in_generate=True,
            pad_token_id=self.loaded.processor.tokenizer.pad_token_id,
        )  # fmt: skip
        self.tally.seconds += clock(self.loaded) - start
        self._cache, new = output[CACHE], output.sequences[0, len(ids) :].tolist()
        self._held = ids + new[:-1]  # the last token was never fed
        report = self._run.report
        if report is not None:
            self.tally.notes.update(report.notes)
        text = how.cut(self.loaded.processor.tokenizer.decode(new, skip_special_tokens=True))
        facts = None if shared else facts_of(report, 1)[0]
        return Answer(text, len(ids), written(new, self.loaded.model.generation_config), facts)

    def _shared(self, prompt: Prompt, ids: list[int], how: Decoding) -> int:
        """How many tokens of the prompt the cache holds already; 0 where it cannot be gone on from."""
        if self._cache is None or prompt.image_id != self._shown or dict(how.arguments).get("num_beams", 1) != 1:
            return 0
        pairs = zip(ids, self._held, strict=False)
        alike = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(ids), len(self._held)))
        shared = min(alike, len(ids) - 1)  # one token at least has to be fed
        return shared if shared >= self._prompt else 0

    def _crop(self, tokens: int) -> bool:
        """Take the newest tokens out of the cache; False where it cannot forget them, and is of no more use."""
        if not tokens:
            return True
        if not all(getattr(layer, "is_croppable", True) for layer in self._cache.layers):  # recurrent states
            return False
        try:
            self._cache.crop(-tokens)
        except RuntimeError:  # a window that is full has lost what would come back
            return False
        return True
