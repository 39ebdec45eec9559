"""Launch-bound decoding: steps so small that what a step costs is Python, as on a GPU at batch 1.

The bundled model decodes after the prefill of every shipped pipeline. Each round times 32 steps dense, twice 32 under
the pipeline and 32 dense again, so that a machine that slows down meanwhile meets both alike.
"""

from __future__ import annotations

import cProfile
import gc
import pstats
import random
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import prunekit
from prunekit import loading, plugins

STEPS = 32  # of one timed run; two of each make a round


@dataclass(frozen=True)
class Launch:
    """One pipeline at batch 1.

    step: median CPU seconds of one decoding step. ratio: the median over rounds of that over the dense steps of the
    same round. calls: Python calls of one step beyond those of a dense one; the same on every machine.
    """

    pipeline: str
    step: float
    ratio: float
    calls: float


def launch_rows(rounds: int, pipelines: tuple[str, ...] | None = None) -> list[Launch]:
    """Every shipped pipeline, or those named, against the dense model."""
    model, processor = loading.load("micro", device="cpu")
    inputs = _prompt(processor)
    names = pipelines or tuple(entry.name for entry in plugins.registry().pipelines())
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    order = list(names)
    for number in range(rounds + 1):  # the first does not count
        random.Random(number).shuffle(order)
        for name in order:
            before, own, more, after = (_decode(model, one, inputs, _cpu) for one in (None, name, name, None))
            times[name] += [(own + more, before + after)] * (number > 0)
    dense = _decode(model, None, inputs, _calls)
    return [
        Launch(
            name,
            statistics.median(own for own, _ in times[name]) / (2 * STEPS),
            statistics.median(own / other for own, other in times[name]),
            (_decode(model, name, inputs, _calls) - dense) / STEPS,
        )
        for name in names
    ]


def _prompt(processor: Any) -> dict[str, Tensor]:
    """A question about one grey image, as large as the model takes."""
    content = [{"type": "image"}, {"type": "text", "text": "What is shown?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return dict(processor(text=text, images=[Image.new("RGB", (168, 168), "grey")], return_tensors="pt"))


@torch.inference_mode()
def _decode(
    model: Any, pipeline: str | None, inputs: dict[str, Tensor], measure: Callable[[Callable[[], None]], float]
) -> float:
    """What `measure` says of `STEPS` decoding steps after a prefill."""
    with nullcontext() if pipeline is None else prunekit.apply(model, pipeline):
        cache = model(**inputs, use_cache=True, logits_to_keep=1).past_key_values
        prompt = inputs["attention_mask"]
        token = torch.full((1, 1), 5)

        def run() -> None:
            mask = prompt
            for _ in range(STEPS):
                mask = torch.cat([mask, mask.new_ones(1, 1)], 1)
                model(input_ids=token, attention_mask=mask, past_key_values=cache)

        gc.collect()
        return measure(run)


def _cpu(run: Callable[[], None]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def _calls(run: Callable[[], None]) -> float:
    profiler = cProfile.Profile()
    profiler.runcall(run)
    return float(pstats.Stats(profiler).total_calls)  # type: ignore[attr-defined]
