"""How much faster a GPU prefills and decodes under pruning, beside what FLOPs promise: one command, eight minutes.

    python -m prunekit_evals.bench.gpu

Language models of the sizes of LLaVA-1.5-7B, LLaVA-NeXT and Qwen2.5-VL-7B are made on the device with random bfloat16
weights; batches of 1, 8 and 32 are prefilled with sdpa attention, dense and under the pipelines below, in interleaved
rounds. Printed are medians: the speed-up, the one that FLOPs promise, the fraction of it that was reached, the time of
a decoding step, and the peak memory. What does not fit into the memory or the time is left out, and said.

Targets: at least 0.9 of the promise; 128 visual tokens from layer 2 on and 24 of 32 layers at least three times faster.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from prunekit_evals.bench.cpu import PAGE, into
from prunekit_evals.bench.gpu_models import MODELS, Decoder, Model, build, inputs_of
from prunekit_evals.bench.timing import settled

import prunekit
from prunekit.upstream import CACHE

FIGURES = PAGE.with_name("performance-gpu.json")
Stages = list[dict[str, Any]]
STEPS = 4


@dataclass(frozen=True)
class Row:
    """One pipeline on one model at one batch size; medians in seconds, memory in bytes.

    promised: dense FLOPs over its own. fraction: of that speed-up, what was reached. memory: the most that was
    allocated at once, weights included; 0 where the device does not say.
    """

    model: str
    batch: int
    pipeline: str
    prefill: float
    speedup: float
    promised: float
    fraction: float
    step: float
    step_ratio: float
    memory: int


def pipelines(decoder: Decoder) -> dict[str, Stages | None]:
    """What is compared. Tokens are taken at random where what is measured does not depend on which they are, and the
    router of PAR is untrained: its rows skip different layers, which costs what it costs after training.
    """
    kept = min(128, decoder.visual // 4)
    start, gone = decoder.layers // 4, decoder.layers // 4
    skipped = [start + 3 * number * (decoder.layers - start) // (3 * gone) for number in range(gone)]
    running = decoder.layers - gone
    return {
        "dense": None,
        "a stage keeps all": [{"use": "random", "at": "encoder", "keep": 1.0}],
        f"FastV, layer 2, T={kept}": [{"use": "fastv", "at": 2, "keep_tokens": kept}],
        f"random, encoder, T={kept}": [{"use": "random", "at": "encoder", "keep_tokens": kept}],
        f"random, layer 2, T={kept}, L={running}": [
            {"use": "random", "at": 2, "keep_tokens": kept},
            {"use": "skip_layers", "layers": skipped},
        ],
        f"PAR, layer 2, T={kept}, L={running}": [
            {"use": "par", "at": 2, "keep_tokens": kept, "keep_layers": running, "weights": None, "seed": 0}
        ],
    }


class Clock:
    """Times calls on a device, and knows how much of the run's time is left."""

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device, self.end = device, time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds until the run should be over."""
        return self.end - time.monotonic()

    def __call__(self, run: Callable[[], Any]) -> float:
        """Seconds until the device has done it."""
        self._wait()
        begin = time.perf_counter()
        run()
        self._wait()
        return time.perf_counter() - begin

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def memory(self, run: Callable[[], Any]) -> int:
        """The most bytes allocated at once while it runs."""
        if self.device.type != "cuda":
            run()
            return 0
        torch.cuda.reset_peak_memory_stats(self.device)
        run()
        return torch.cuda.max_memory_allocated(self.device)


@dataclass
class Found:
    """What one pipeline has shown so far."""

    prefills: list[float]
    steps: list[float]
    memory: int
    promised: float


@torch.inference_mode()
def once(model: Any, stages: Stages | None, inputs: dict[str, Any], clock: Clock, before: Found | None) -> Found:
    """One prefill and a few decoding steps; the first call of a pipeline also measures its memory, and no time."""
    context = nullcontext() if stages is None else prunekit.apply(model, {"name": "bench", "stages": stages})
    with context as run:
        box: list[Any] = []

        def prefill() -> None:
            box[:] = [model(**inputs, use_cache=True)[CACHE]]

        if before is None:
            memory = clock.memory(prefill)
            report = None if run is None else run.report
            return Found([], [], memory, 1.0 if report is None else 1 / report.cost.flops_fraction)
        before.prefills.append(clock(prefill))
        ids = inputs["input_ids"]
        token = ids.new_full((len(ids), 1), 20)
        for number in range(STEPS):
            step = {"input_ids": token, CACHE: box[0]}  # no row is padded, so that no mask is needed
            taken = clock(lambda step=step: model(**step))
            before.steps += [taken] * (number > 0)  # the first one allocates
    return before


@settled()
def measure(model: Any, name: str, decoder: Decoder, batch: int, rounds: int, clock: Clock, share: float) -> list[Row]:
    """Every pipeline on one model and batch size, interleaved, for at most `share` seconds (but one round)."""
    dtype = next(model.parameters()).dtype
    inputs, chosen = inputs_of(model, decoder, batch, dtype), pipelines(decoder)
    results = {one: once(model, stages, inputs, clock, None) for one, stages in chosen.items()}
    end = clock.left - share
    order = list(chosen)
    for number in range(rounds):
        if number and clock.left < end:
            break
        random.Random(number).shuffle(order)
        for one in order:
            gc.collect()
            once(model, chosen[one], inputs, clock, results[one])
    base = statistics.median(results["dense"].prefills), statistics.median(results["dense"].steps)
    rows = []
    for one, seen in results.items():
        prefill, step = statistics.median(seen.prefills), statistics.median(seen.steps)
        speedup = base[0] / prefill
        fraction = speedup / seen.promised
        rows.append(Row(name, batch, one, prefill, speedup, seen.promised, fraction, step, step / base[1], seen.memory))
    return rows


def table(rows: Sequence[Row]) -> str:
    """A Markdown table."""
    lines = [
        "| model | batch | pipeline | prefill ms | speed-up | promised | fraction | step ms | of dense | peak GB |",
        "| --- | ---: | --- |" + " ---: |" * 7,
    ]
    for row in rows:
        lines.append(
            f"| {row.model} | {row.batch} | {row.pipeline} | {1e3 * row.prefill:.1f} | {row.speedup:.2f} "
            f"| {row.promised:.2f} | {row.fraction:.2f} | {1e3 * row.step:.1f} | {row.step_ratio:.2f} "
            f"| {row.memory / 1e9:.1f} |"
        )
    return "\n".join(lines)


def misses(rows: Sequence[Row]) -> list[str]:
    """The targets that were not reached."""
    missed = []
    for row in rows:
        where = f"{row.model}, batch {row.batch}, {row.pipeline}"
        if row.fraction < 0.9:
            missed.append(f"{where}: {row.fraction:.2f} of the promise")
        if row.model == MODELS[0].name and "L=24" in row.pipeline and row.speedup < 3:
            missed.append(f"{where}: {row.speedup:.2f} times faster")
    return missed


def run_model(model: Model, batches: Sequence[int], arguments: argparse.Namespace, clock: Clock) -> list[Row]:
    """All batch sizes of one model; says what it leaves out."""
    decoder = model.toy if arguments.tiny else model.decoder
    dtype = torch.float32 if clock.device.type == "cpu" else torch.bfloat16
    live = build(model.config(decoder), clock.device, dtype)
    rows: list[Row] = []
    for place, batch in enumerate(batches):
        if clock.left <= 0:
            print(f"{model.name}, batch {batch}: left out, the time is over", flush=True)
            continue
        share = clock.left / (len(batches) - place) / arguments.models_left
        try:
            rows += measure(live, model.name, decoder, batch, arguments.rounds, clock, share)
        except torch.cuda.OutOfMemoryError:
            print(f"{model.name}, batch {batch}: left out, {torch.cuda.get_device_name()} is too small", flush=True)
        gc.collect()
        if clock.device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="after which no new measurement begins (8)")
    parser.add_argument("--rounds", type=int, default=9, help="most timed rounds of each model and batch size (9)")
    parser.add_argument("--batches", default="1,8,32", help="batch sizes (1,8,32)")
    parser.add_argument("--tiny", action="store_true", help="toy models on the CPU: shows that the script runs")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu.json"), help="where the figures go")
    parser.add_argument("--docs", action="store_true", help=f"measure nothing; put {FIGURES.name} into {PAGE.name}")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, write it as JSON, and return 1 where there is no GPU or a target is missed."""
    arguments = parsed(argv)
    if arguments.docs:
        figures = json.loads(FIGURES.read_text(encoding="utf-8"))
        shown = f"On one {figures['about']['device']}:\n\n{table([Row(**row) for row in figures['rows']])}"
        PAGE.write_text(into(PAGE.read_text(encoding="utf-8"), {"gpu": shown}), encoding="utf-8")
        return 0
    if not arguments.tiny and not torch.cuda.is_available():
        print(
            "no CUDA device; `--tiny` runs toy models on the CPU, `make bench` measures what a CPU can", file=sys.stderr
        )
        return 1
    device = torch.device("cpu" if arguments.tiny else "cuda")
    clock = Clock(device, 60 * arguments.minutes)
    batches = [int(size) for size in arguments.batches.split(",")]
    rows: list[Row] = []
    for number, model in enumerate(MODELS):
        arguments.models_left = len(MODELS) - number
        mine = run_model(model, batches, arguments, clock)
        print(table(mine), flush=True)
        rows += mine
    name = platform.processor() if arguments.tiny else torch.cuda.get_device_name()
    versions = {module.__name__: module.__version__ for module in (torch, transformers, prunekit)}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    about = {"device": name, "tiny": arguments.tiny, **versions}
    arguments.out.write_text(json.dumps({"about": about, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    missed = misses(rows)
    print("targets met" if not missed else "targets missed:\n  " + "\n  ".join(missed))
    print(f"figures: {arguments.out}")
    return 1 if missed and not arguments.tiny else 0


if __name__ == "__main__":
    sys.exit(main())
