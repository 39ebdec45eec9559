"""From what reports say of single questions to what a cell says of all: what was executed, and what was foretold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from statistics import fmean

from prunekit_evals.run.journal import Facts
from prunekit_evals.run.results import Executed, Foretold

from prunekit.pipeline.bound import BoundPipeline
from prunekit.pipeline.build import Pipeline
from prunekit.pipeline.forecast import Forecast, forecast
from prunekit.strategy.decisions import ModelShape


def executed(facts: Sequence[Facts]) -> Executed | None:
    """What the decoder did; None where nothing was reported, or only by a journal of an older version."""
    told = [one for one in facts if one.layer_tokens]
    if not told or len(told) < len(facts):
        return None
    entered = zip(*(one.layer_tokens for one in told), strict=True)
    return Executed(
        tuple(fmean(layer) for layer in entered),
        fmean(one.layers_run for one in told),
        sum(bool(one.missed) for one in told),
    )


def missed(facts: Sequence[Facts]) -> list[str]:
    """A sentence for each stage that kept another number than its budget asked for."""
    found: dict[str, list[tuple[int, int]]] = {}
    questions: Counter[str] = Counter()
    for one in facts:
        for stage, asked, kept in one.missed:
            found.setdefault(stage, []).append((asked, kept))
        questions.update({stage for stage, *_ in one.missed})
    return [
        f"{stage} kept {_range(kept for _, kept in pairs)} visual tokens where its budget asked for "
        f"{_range(asked for asked, _ in pairs)}, for {questions[stage]} questions"
        for stage, pairs in found.items()
    ]


def foretold(facts: Sequence[Facts], pipeline: Pipeline, shape: ModelShape) -> Foretold | None:
    """What budgets say of these prompts, each taken for one visual input; None where they cannot tell of every one."""
    told: dict[tuple[int, int], Forecast | None] = {}
    bound: dict[int, BoundPipeline] = {}
    for one in facts:
        visual, text = one.visual_tokens, one.prompt_tokens - one.visual_tokens
        if (visual, text) in told or not visual:
            continue
        if visual not in bound:
            bound[visual] = pipeline.bind(replace(shape, visual_tokens=visual))
        told[visual, text] = forecast(bound[visual], text)
    every = [told.get((one.visual_tokens, one.prompt_tokens - one.visual_tokens)) for one in facts]
    known = [one for one in every if one is not None]
    if not known or len(known) < len(every):
        return None
    return Foretold(
        (fmean(_flops(one, 0) for one in known), fmean(_flops(one, 1) for one in known)),
        tuple(fmean(layer) for layer in zip(*(one.layer_tokens for one in known), strict=True)),
    )


def _flops(one: Forecast, end: int) -> int:
    """As reports count them: the decoder's layers, and what it takes to decide."""
    return one.prefill[end] + one.selection[end] + one.routing[end]


def _range(numbers: Iterable[int]) -> str:
    found = sorted(numbers)
    return str(found[0]) if found[0] == found[-1] else f"{found[0]} to {found[-1]}"
