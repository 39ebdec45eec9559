"""The parts of the CPU benchmark: each measures one thing and gives plain rows.

Ratios are of medians of one interleaved run. FLOPs are those of `prunekit/cost.py`.
"""

from __future__ import annotations

import cProfile
import pstats
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from prunekit_evals.bench.timing import PeakMemory, Time, interleaved, median
from prunekit_evals.bench.workload import (
    FASTV,
    PIPELINES,
    PRUNES,
    Size,
    applied,
    inputs_of,
    model_of,
    par_of,
    prefill,
    report_of,
)
from torch import Tensor, nn

from prunekit.upstream import CACHE

# Where the engine lets a stage compute its inputs and decide; what the profiler sums up as the cost of scoring.
SCORING = ("engine/asking.py", "decide")
# Text tokens of the eight rows of a ragged batch.
RAGGED = (64, 40, 56, 24, 48, 64, 32, 60)


@dataclass(frozen=True)
class Row:
    """One pipeline: medians in seconds, its time as a fraction of dense, and how much of the promise is kept.

    saved_of_promised: None for a pipeline that promises nothing.
    """

    pipeline: str
    cpu: float
    wall: float
    cpu_ratio: float
    wall_ratio: float
    flops_fraction: float
    saved_of_promised: float | None
    speedup: float
    promised_speedup: float


def row(name: str, own: Sequence[Time], dense: Sequence[Time], flops: float) -> Row:
    """A row from the times of a pipeline and of the dense model, and its FLOPs as a fraction of dense."""
    mine, base = median(own), median(dense)
    cpu_ratio, wall_ratio = mine.cpu / base.cpu, mine.wall / base.wall
    saved = (1 - cpu_ratio) / (1 - flops) if flops < 1 else None
    return Row(name, mine.cpu, mine.wall, cpu_ratio, wall_ratio, flops, saved, 1 / cpu_ratio, 1 / flops)


def flops_of(model: Any, stages: list[Any] | None, inputs: dict[str, Any]) -> float:
    """Prefill FLOPs under a pipeline over those of the dense model."""
    report = report_of(model, stages, inputs)
    return 1.0 if report is None else float(report.cost.flops_fraction)


def prefill_rows(size: Size, rounds: int) -> list[Row]:
    """Every pipeline against the dense model."""
    model, inputs = model_of(size), inputs_of(size)
    cases = {name: partial(prefill, model, stages, inputs) for name, stages in PIPELINES.items()}
    times = interleaved(cases, rounds, "prefill")
    return [row(name, times[name], times["dense"], flops_of(model, PIPELINES[name], inputs)) for name in PIPELINES]


def par_rows(size: Size, rounds: int) -> list[Row]:
    """PAR, and what its tokens, its layers and its router do by themselves, against the dense model. The first row is
    PAR whole; FLOPs include the router's.
    """
    model, inputs = model_of(size), inputs_of(size)
    chosen: dict[str, list[Any] | None] = {"dense": None, **par_of(size)}
    cases = {name: partial(prefill, model, stages, inputs) for name, stages in chosen.items()}
    times = interleaved(cases, rounds, "par")
    return [row(name, times[name], times["dense"], flops_of(model, chosen[name], inputs)) for name in par_of(size)]


def scoring_share(size: Size, rounds: int) -> float:
    """Time that FastV takes to score and select, as a fraction of the *dense* prefill; the median of `rounds`.

    From Python's profiler: everything below the engine's call of the stage, which is where the attention row is
    computed, since inputs are computed when they are asked for.
    """
    model, inputs = model_of(size), inputs_of(size)
    stages: list[Any] = [FASTV]
    shares = []
    for _ in range(rounds):
        dense = cumulative(prefill(model, None, inputs))
        inside = cumulative(prefill(model, stages, inputs), SCORING)
        shares.append(inside / dense)
    return sorted(shares)[len(shares) // 2]


@torch.inference_mode()
def cumulative(case: AbstractContextManager[Any], function: tuple[str, str] | None = None) -> float:
    """Seconds of one run, or of one function within it and all that it calls. Raises LookupError if it never ran."""
    profiler = cProfile.Profile()
    with case as run:
        profiler.enable()
        run()
        profiler.disable()
    statistics = pstats.Stats(profiler)
    if function is None:
        return float(statistics.total_tt)  # type: ignore[attr-defined]
    entries = [
        timing[3]
        for (file, _, name), timing in statistics.stats.items()  # type: ignore[attr-defined]
        if file.replace("\\", "/").endswith(function[0]) and name == function[1]
    ]
    if not entries:
        raise LookupError(f"{function[1]} of {function[0]} did not run: the benchmark looks for it under another name")
    return float(sum(entries))


def peers(size: Size, rounds: int) -> list[Row]:
    """FastV as its authors run it, with eager attention throughout, and FastV by masking, against ours, all of dense
    sdpa.
    """
    inputs = inputs_of(size)
    model, eager = model_of(size), model_of(size, "eager")
    stages: list[Any] = [FASTV]
    flops = flops_of(model, stages, inputs)
    cases = {
        "dense, sdpa": (partial(prefill, model, None, inputs), 1.0),
        "dense, eager": (partial(prefill, eager, None, inputs), 1.0),
        "FastV here, sdpa": (partial(prefill, model, stages, inputs), flops),
        "FastV, eager attention": (partial(prefill, eager, stages, inputs), flops),
        "FastV by masking, sdpa": (partial(masked, model, inputs, 2, 0.25), 1.0),
    }
    times = interleaved({name: case for name, (case, _) in cases.items()}, rounds, "peers")
    return [row(name, times[name], times["dense, sdpa"], share) for name, (_, share) in cases.items()]


@contextmanager
def masked(model: Any, inputs: dict[str, Any], layer: int, keep: float) -> Iterator[Any]:
    """A case: nothing is dropped, but from `layer` on, attention is forbidden to look at all but `keep` of the visual
    tokens (evenly spaced ones; which they are costs nothing here).
    """
    ids = inputs["input_ids"]
    visual = (ids == model.config.image_token_id)[0].nonzero()[:, 0]
    step = round(1 / keep)
    hidden = torch.ones(ids.shape[1], dtype=torch.bool).index_fill(0, visual, False)
    hidden[visual[::step]] = True
    size = ids.shape[1]
    mask = (torch.ones(size, size, dtype=torch.bool).tril() & hidden | torch.eye(size, dtype=torch.bool))[None, None]

    def edit(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return arguments, named | {"attention_mask": mask}

    with ExitStack() as stack:
        for one in model.get_decoder().layers[layer:]:
            stack.callback(one.register_forward_pre_hook(edit, with_kwargs=True).remove)
        yield lambda: model(**inputs)


@dataclass(frozen=True)
class Decode:
    """One pipeline: the median time of one decoding step in seconds, and as a fraction of the dense model's."""

    pipeline: str
    step: float
    ratio: float


def decode_rows(size: Size, rounds: int, steps: int = 8) -> list[Decode]:
    """Decoding at batch 1 after the prefill of each pipeline."""
    model, inputs = model_of(size), inputs_of(size)
    chosen: dict[str, list[Any] | None] = {"dense": None, **PRUNES}
    cases = {name: partial(decoding, model, stages, inputs, steps) for name, stages in chosen.items()}
    times = {name: median(taken).cpu / steps for name, taken in interleaved(cases, rounds, "decode").items()}
    return [Decode(name, step, step / times["dense"]) for name, step in times.items()]


@contextmanager
def decoding(model: Any, stages: list[Any] | None, inputs: dict[str, Any], steps: int) -> Iterator[Any]:
    """A case: `steps` decoding steps after a prefill that is not timed."""
    mask: Tensor = inputs["attention_mask"]
    token = torch.full((len(mask), 1), 5)
    with applied(model, stages):
        cache = model(**inputs, use_cache=True)[CACHE]

        def run() -> None:
            seen = mask
            for _ in range(steps):
                seen = torch.cat([seen, seen.new_ones(len(seen), 1)], 1)
                model(input_ids=token, attention_mask=seen, **{CACHE: cache})

        yield run


@dataclass(frozen=True)
class Batch:
    """A ragged batch: tokens (without padding) a second, as a fraction of those of the batch whose rows are all as
    long as the longest. filled: tokens over slots after padding, in the prompt and as the pipeline leaves them.
    """

    pipeline: str
    tokens_per_second: float
    ratio: float
    filled: float
    filled_pruned: float


def batch_rows(size: Size, rounds: int, texts: Sequence[int] = RAGGED) -> list[Batch]:
    """A batch of eight whose rows differ in length, under each pipeline, against one of equal rows."""
    model = model_of(size)
    even, ragged = inputs_of(size, [max(texts)] * len(texts)), inputs_of(size, texts)
    chosen: dict[str, list[Any] | None] = {"dense": None, **PRUNES}
    cases = {}
    for name, stages in chosen.items():
        cases[name, True] = partial(prefill, model, stages, even)
        cases[name, False] = partial(prefill, model, stages, ragged)
    labelled = {f"{name}{' even' * same}": case for (name, same), case in cases.items()}
    times = {name: median(taken).cpu for name, taken in interleaved(labelled, rounds, "batch").items()}
    rows = []
    for name, stages in chosen.items():
        speed = int(ragged["attention_mask"].sum()) / times[name]
        base = even["attention_mask"].numel() / times[f"{name} even"]
        report = report_of(model, stages, ragged)
        last = [1] if report is None else [tokens[-1] for tokens in report.layer_tokens]
        filled = float(ragged["attention_mask"].float().mean())
        pruned = filled if report is None else sum(last) / len(last) / max(last)
        rows.append(Batch(name, speed, speed / base, filled, pruned))
    return rows


@dataclass(frozen=True)
class Memory:
    """One pipeline: the peak of what tensors held during the prefill beside the weights, and the KV cache after it, in
    bytes and of dense; and the KV bytes that the report states.
    """

    pipeline: str
    peak: int
    peak_ratio: float
    kv: int
    kv_ratio: float
    kv_stated: int


def memory_rows(size: Size) -> list[Memory]:
    """Every pipeline, once: these figures do not vary."""
    model, inputs = model_of(size), inputs_of(size)
    measured = {name: memory_of(model, stages, inputs) for name, stages in PIPELINES.items()}
    peak, held, _ = measured["dense"]
    return [Memory(name, p, p / peak, kv, kv / held, stated) for name, (p, kv, stated) in measured.items()]


@torch.inference_mode()
def memory_of(model: Any, stages: list[Any] | None, inputs: dict[str, Any]) -> tuple[int, int, int]:
    """Peak bytes, bytes of keys and values in the cache, and KV bytes by the report."""
    with applied(model, stages) as run:
        with PeakMemory() as memory:
            cache = model(**inputs, use_cache=True)[CACHE]
        kept = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values) if tensor is not None]
        held = sum(tensor.numel() * tensor.element_size() for tensor in kept)
        stated = held if run is None or run.report is None else sum(run.report.cost.kv_bytes)
    return memory.peak, held, stated
