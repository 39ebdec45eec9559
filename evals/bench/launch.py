"""Launch-bound decoding: steps so small that what a step costs is Python, as on a GPU at batch 1.

The bundled model decodes 64 steps after the prefill of every shipped pipeline, and 64 dense, in turns of 8 steps:
dense, pruned, pruned, dense. Turns so short meet the same machine, however busy it is. Only the steps are timed, after
as many that warm up what putting the pipeline on has changed: Python specialises its code anew.
"""

from __future__ import annotations

import cProfile
import gc
import pstats
import random
import statistics
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from prunekit_evals.bench.timing import settled
from torch import Tensor

import prunekit
from prunekit import families, loading, plugins
from prunekit.errors import SpecError
from prunekit.upstream import CACHE

STEPS, TURN, WARM = 64, 8, 8


@dataclass(frozen=True)
class Launch:
    """One pipeline at batch 1.

    step: median CPU seconds of one decoding step. ratio: the median of that over a dense step, each of two turns beside
    each other. calls: Python calls of one step beyond those of a dense one; the same on every machine.
    """

    pipeline: str
    step: float
    ratio: float
    calls: float


def _fits(pipeline: str, shape: prunekit.ModelShape) -> bool:
    """Not one for other towers, say."""
    try:
        return bool(prunekit.load(pipeline).bind(shape))
    except SpecError:
        return False


@settled()
def launch_rows(rounds: int, pipelines: tuple[str, ...] | None = None) -> list[Launch]:
    """Every shipped pipeline that fits the model, or those named, against the dense model."""
    model, processor = loading.load("micro", device="cpu")
    inputs = _prompt(processor)
    shape = families.shape_of(model)
    names = pipelines or tuple(entry.name for entry in plugins.registry().pipelines() if _fits(entry.name, shape))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    order = list(names)
    for number in range(rounds + 1):  # the first does not count
        random.Random(number).shuffle(order)
        for name in order:
            times[name] += _turns(model, name, inputs) * (number > 0)
    dense = _calls(_Decoding(model, None, inputs))
    return [
        Launch(
            name,
            statistics.median(own for own, _ in times[name]) / (2 * TURN),
            statistics.median(own / other for own, other in times[name]),
            _calls(_Decoding(model, name, inputs)) - dense,
        )
        for name in names
    ]


class _Decoding:
    """Decoding after a prefill, a few steps at a time; between them the model is free."""

    @torch.inference_mode()
    def __init__(self, model: Any, pipeline: str | None, inputs: dict[str, Tensor]) -> None:
        self.model, self.pipeline, self.mask = model, pipeline, inputs["attention_mask"]
        with self.applied():
            self.cache = model(**inputs, use_cache=True, logits_to_keep=1)[CACHE]

    def applied(self) -> AbstractContextManager[Any]:
        """The pipeline on the model; nothing for the dense model."""
        return nullcontext() if self.pipeline is None else prunekit.apply(self.model, self.pipeline)

    @torch.inference_mode()
    def steps(self, number: int) -> None:
        """Decode so many tokens."""
        token = torch.full((1, 1), 5)
        for _ in range(number):
            self.mask = torch.cat([self.mask, self.mask.new_ones(1, 1)], 1)
            self.model(input_ids=token, attention_mask=self.mask, **{CACHE: self.cache})


def _turns(model: Any, pipeline: str, inputs: dict[str, Tensor]) -> list[tuple[float, float]]:
    """CPU seconds of two turns under the pipeline and of the two dense ones around them."""
    dense, own = _Decoding(model, None, inputs), _Decoding(model, pipeline, inputs)
    gc.collect()
    times = []
    for _ in range(STEPS // TURN // 2):
        before, first, second, after = (_seconds(decoding) for decoding in (dense, own, own, dense))
        times.append((first + second, before + after))
    return times


def _seconds(decoding: _Decoding) -> float:
    """CPU seconds of one turn."""
    with decoding.applied():
        decoding.steps(WARM)
        start = time.process_time()
        decoding.steps(TURN)
        return time.process_time() - start


def _calls(decoding: _Decoding) -> float:
    """Python calls of one step."""
    profiler = cProfile.Profile()
    with decoding.applied():
        profiler.runcall(decoding.steps, STEPS)
    return float(pstats.Stats(profiler).total_calls) / STEPS  # type: ignore[attr-defined]


def _prompt(processor: Any) -> dict[str, Tensor]:
    """A question about one grey image, as large as the model takes."""
    content = [{"type": "image"}, {"type": "text", "text": "What is shown?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return dict(processor(text=text, images=[Image.new("RGB", (168, 168), "grey")], return_tensors="pt"))
