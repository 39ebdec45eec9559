"""How likely continuations of a prompt are: one pruned prefill, then all of them in batches on copies of its cache."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from prunekit_evals.run.answering import Loaded, Tally, encode, facts_of
from prunekit_evals.run.prompts import Prompt
from torch import Tensor

import prunekit
from prunekit.errors import InputError
from prunekit.pipeline.build import Pipeline
from prunekit.upstream import CACHE

Scored = tuple[float, bool]


def losses(
    loaded: Loaded, pipeline: Pipeline, prompt: Prompt, said: Sequence[str], batch: int, tally: Tally
) -> list[Scored]:
    """For each continuation its mean negative log-likelihood, and whether greedy decoding would say it.

    batch: at most so many continuations are computed together. The prompt is prefilled once, under the pipeline, and
    continuations are fed after it, so that a stage that reads the prompt's last token sees the same as when answering.
    Raises InputError for a continuation without tokens.
    """
    ids = [_tokens(loaded, one) for one in said]
    inputs = encode(loaded, [prompt])
    scored: list[Scored] = []
    with torch.inference_mode(), prunekit.apply(loaded.model, pipeline, processor=loaded.processor) as run:
        first = loaded.model(**inputs, use_cache=True, logits_to_keep=1)
        report = run.report
        for begin in range(0, len(ids), batch):
            last = begin + batch >= len(ids)
            cache = first[CACHE] if last else copy.deepcopy(first[CACHE])
            scored += _score(loaded, first.logits[:, -1:], cache, ids[begin : begin + batch])
    if report is not None:
        tally.notes.update(report.notes)
        tally.facts += [one for one in facts_of(report, 1) if one is not None]
    broken = report is not None and bool(report.unsound)
    tally.unsound += sum(broken or loss != loss for loss, _ in scored)
    return scored


def _tokens(loaded: Loaded, text: str) -> list[int]:
    ids: list[int] = loaded.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise InputError(f"the continuation {text!r} has no tokens")
    return ids


def _score(loaded: Loaded, first: Tensor, cache: Any, ids: Sequence[list[int]]) -> list[Scored]:
    """Continuations of one prefilled prompt, each padded on the right, where no token of it sees the padding.

    first: logits (1, 1, V) behind the prompt. cache: its own, which is used up. ids: token ids, of unequal lengths.
    """
    lengths = torch.tensor([len(one) for one in ids], device=loaded.device)
    longest, pad = max(map(len, ids)), loaded.processor.tokenizer.pad_token_id
    tokens = torch.tensor([one + [pad] * (longest - len(one)) for one in ids], device=loaded.device)
    valid = torch.arange(longest, device=loaded.device) < lengths[:, None]
    logits = first.expand(len(ids), -1, -1)
    if longest > 1:
        if len(ids) > 1:
            # As for beams; layers with recurrent states know no other way to repeat rows.
            cache.reorder_cache(torch.zeros(len(ids), dtype=torch.long, device=loaded.device))
        rest = loaded.model(input_ids=tokens[:, :-1], **{CACHE: cache}, use_cache=True)
        logits = torch.cat([logits, rest.logits], 1)
    chosen = logits.double().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    means = torch.where(valid, chosen, 0.0).sum(1) / lengths
    greedy = ((logits.argmax(-1) == tokens) | ~valid).all(1)
    return [(-mean, said) for mean, said in zip(means.tolist(), greedy.tolist(), strict=True)]
