"""What prunekit costs when it prunes nothing, and how much of the promised time it really saves.

A random LLaVA with 576 visual and 64 text tokens is prefilled on one thread, in float32 with sdpa attention: dense,
under pipelines that prune nothing, and under pipelines that prune. What is timed is the prefill of the language model
up to the logits of the last token; image features are given, so the vision tower does not run. The runs are
interleaved, so that whatever else the machine does meets all of them alike; times are CPU times of the process, with
wall times beside them.

    python benchmarks/prefill.py --rounds 11 --out runs/prefill.json

"saved of promised" is (1 - time / dense time) / (1 - FLOPs / dense FLOPs), with FLOPs as in prunekit/cost.py.
Targets: nothing pruned <= 1.01 of dense, saved of promised >= 0.97.
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
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

import prunekit

IMAGE = 3


@dataclass(frozen=True)
class Size:
    """A model and its prompt; `side` squared visual tokens and `text` text tokens."""

    layers: int = 16
    hidden: int = 1024
    mlp: int = 2752
    heads: int = 16
    side: int = 24
    text: int = 64


TINY = Size(layers=8, hidden=64, mlp=128, heads=4, side=6, text=8)

FASTV = {"use": "fastv", "at": 2, "keep": 0.25}
SKIP = {"use": "skip_layers", "layers": [3, 4, 5, 6]}
PRUNES_NOTHING = {
    "no stage acts": [{"use": "dense"}],
    "a stage keeps all": [{"use": "stride", "at": "encoder", "keep": 1.0}],
}
PRUNES = {
    "FastV, before layer 2, keep 25 %": [FASTV],
    "stride, at the encoder, keep 25 %": [{"use": "stride", "at": "encoder", "keep": 0.25}],
    "skip 4 layers": [SKIP],
    "stride 50 %, FastV 25 %, skip 4": [{"use": "stride", "at": "encoder", "keep": 0.5}, FASTV, SKIP],
}


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


def model_of(size: Size) -> LlavaForConditionalGeneration:
    """A random LLaVA with a token of a vision tower."""
    text = LlamaConfig(
        vocab_size=2048, hidden_size=size.hidden, intermediate_size=size.mlp, num_hidden_layers=size.layers,
        num_attention_heads=size.heads, num_key_value_heads=size.heads, max_position_embeddings=4096,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, patch_size=2,
        image_size=2 * size.side,
    )  # fmt: skip
    config = LlavaConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE, image_seq_length=size.side**2,
        vision_feature_layer=-1, vision_feature_select_strategy="default", attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config).eval().requires_grad_(False)


def inputs_of(size: Size) -> dict[str, Any]:
    """One prompt: eight text tokens, one image, the rest of the text."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(IMAGE + 1, 2048, (size.text,), generator=generator)
    ids = torch.cat([words[:8], torch.full((size.side**2,), IMAGE), words[8:]])[None]
    features = (torch.randn(size.side**2, size.hidden, generator=generator),)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=features)},
        "logits_to_keep": 1,
    }


@torch.inference_mode()
def time_once(
    model: LlavaForConditionalGeneration, stages: list[Any] | None, inputs: dict[str, Any]
) -> tuple[float, float, float]:
    """CPU seconds, wall seconds and FLOPs fraction of one prefill; `stages` None is the bare model."""
    context = nullcontext() if stages is None else prunekit.apply(model, {"name": "bench", "stages": stages})
    with context as run:
        gc.collect()
        wall, cpu = time.perf_counter(), time.process_time()
        model(**inputs)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        report = None if run is None else run.report
    return cpu, wall, 1.0 if report is None else report.cost.flops_fraction


def measure(size: Size, rounds: int, progress: bool = False) -> list[Row]:
    """Time every pipeline `rounds` times, in a new order each round, after one round that does not count."""
    model, inputs = model_of(size), inputs_of(size)
    pipelines: dict[str, list[Any] | None] = {"dense": None, **PRUNES_NOTHING, **PRUNES}
    times: dict[str, list[tuple[float, float, float]]] = {name: [] for name in pipelines}
    order = list(pipelines)
    for number in range(rounds + 1):
        random.Random(number).shuffle(order)
        for name in order:
            taken = time_once(model, pipelines[name], inputs)
            times[name] += [taken] * (number > 0)
        if progress:
            sys.stderr.write(f"\rround {number} of {rounds}" + "\n" * (number == rounds))
    return [_row(name, times[name], times["dense"]) for name in pipelines]


def _row(name: str, own: Sequence[tuple[float, float, float]], dense: Sequence[tuple[float, float, float]]) -> Row:
    cpu, wall = (statistics.median(run[i] for run in own) for i in (0, 1))
    cpu_ratio, wall_ratio = (m / statistics.median(run[i] for run in dense) for i, m in ((0, cpu), (1, wall)))
    flops = own[0][2]
    saved = (1 - cpu_ratio) / (1 - flops) if flops < 1 else None
    return Row(name, cpu, wall, cpu_ratio, wall_ratio, flops, saved, 1 / cpu_ratio, 1 / flops)


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| pipeline | CPU s | of dense | wall, of dense | FLOPs, of dense | saved of promised | speed-up (promised) |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        saved = "" if row.saved_of_promised is None else f"{row.saved_of_promised:.3f}"
        lines.append(
            f"| {row.pipeline} | {row.cpu:.3f} | {row.cpu_ratio:.3f} | {row.wall_ratio:.3f} | {row.flops_fraction:.3f} "
            f"| {saved} | {row.speedup:.2f} ({row.promised_speedup:.2f}) |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, write it as JSON, and return 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=11, help="timed runs of each pipeline (11)")
    parser.add_argument("--tiny", action="store_true", help="a toy model: shows that the benchmark runs, nothing else")
    parser.add_argument("--out", type=Path, default=Path("runs/prefill.json"), help="where the figures go")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    size = TINY if arguments.tiny else Size()
    rows = measure(size, arguments.rounds, progress=sys.stderr.isatty())
    print(table(rows))
    versions = {module.__name__: module.__version__ for module in (torch, transformers, prunekit)}
    about = {"size": asdict(size), "rounds": arguments.rounds, "threads": 1, "machine": platform.machine(), **versions}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"about": about, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    missed = [row.pipeline for row in rows if row.pipeline in PRUNES_NOTHING and row.cpu_ratio > 1.01]
    missed += [row.pipeline for row in rows if row.saved_of_promised is not None and row.saved_of_promised < 0.97]
    print("targets met" if not missed else f"targets missed by: {'; '.join(missed)}")
    print(f"figures: {arguments.out}")
    return 1 if missed and not arguments.tiny else 0


if __name__ == "__main__":
    sys.exit(main())
