"""Prefill time of a pipeline over the dense model's, measured alternately in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from prunekit_evals.run.answering import Loaded, clock, encode
from prunekit_evals.run.prompts import Prompt

import prunekit
from prunekit.pipeline.build import Pipeline

LEAST_ROUNDS, MOST_ROUNDS, SECONDS = 5, 15, 2.0


@dataclass(frozen=True)
class PrefillTime:
    """Milliseconds for one batch, medians; `ratio` is the median of the ratios of neighbours, which a slow moment of
    the machine hits alike.
    """

    ms: float
    dense_ms: float
    ratio: float
    batch: int
    rounds: int


def measure_prefill(loaded: Loaded, pipeline: Pipeline, prompts: Sequence[Prompt]) -> PrefillTime | None:
    """Time the whole prefill of one batch, vision tower and selection included; None without prompts.

    Dense and pruned take turns, and who goes first alternates; the first turn of each is not counted.
    """
    if not prompts:
        return None
    inputs = encode(loaded, prompts)

    def once(chosen: Pipeline | None) -> float:
        pruned = prunekit.apply(loaded.model, chosen, processor=loaded.processor) if chosen else nullcontext()
        with torch.inference_mode(), pruned:
            start = clock(loaded)
            loaded.model(**inputs, use_cache=True, logits_to_keep=1)
            return clock(loaded) - start

    return summary(once, pipeline, len(prompts))


def summary(once: Callable[[Any], float], pipeline: object, batch: int) -> PrefillTime:
    """Take turns with `once(None)`, dense, and `once(pipeline)`, both in seconds, until there is enough."""
    once(None)
    once(pipeline)
    ours: list[float] = []
    dense: list[float] = []
    begun = time.perf_counter()
    while len(ours) < LEAST_ROUNDS or (len(ours) < MOST_ROUNDS and time.perf_counter() - begun < SECONDS):
        turns: list[tuple[Any, list[float]]] = [(None, dense), (pipeline, ours)]
        for chosen, times in turns if len(ours) % 2 else reversed(turns):
            times.append(once(chosen))
    ratio = statistics.median(mine / other for mine, other in zip(ours, dense, strict=True))
    return PrefillTime(1e3 * statistics.median(ours), 1e3 * statistics.median(dense), ratio, batch, len(ours))
