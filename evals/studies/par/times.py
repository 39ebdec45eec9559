"""Measured time and KV beside the FLOPs: on the bundled model, and on the random model of the CPU benchmark.

Cases take turns in random order, so that whatever else the machine does meets all alike; times are processor times.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import yaml
from prunekit_evals.bench import sections, timing, workload
from prunekit_evals.run.stamp import TASKS
from prunekit_evals.studies.par import asked
from prunekit_evals.studies.par.cells import Bench, Stages, say
from prunekit_evals.studies.par.parts import Routers
from prunekit_evals.studies.par.settings import PAPER, Setting

from prunekit.pipeline.build import Pipeline

STEPS, BATCH = 8, 32  # of decoding; questions at a time
DENSE = "dense"


def micro(bench: Bench, routers: Routers, settings: Sequence[Setting], rounds: int) -> dict[str, Any]:
    """The bundled model with its router, by number of questions at a time."""
    cases: dict[str, Any] = {DENSE: None, **{str(one): _stages(routers.at(bench, one)) for one in settings}}
    measured = {}
    for size, times in ((1, 3), (BATCH, 1)):
        batch = next(asked.batches(bench.loaded, bench.items[TASKS[0]][:size], TASKS[0]))
        one_token = {**batch.inputs, "logits_to_keep": 1}
        measured[str(size)] = _measured(bench.loaded.model, cases, one_token, times * rounds)
    return measured


def large(size: workload.Size, rounds: int) -> dict[str, Any]:
    """The benchmark's model with a new router, at the paper's shares of tokens and layers."""
    measured = _measured(workload.model_of(size), paper_cases(size, PAPER), workload.inputs_of(size), rounds)
    return {"layers": size.layers, "hidden": size.hidden, "visual": size.side**2, "text": size.text, **measured}


def paper_cases(size: workload.Size, settings: Sequence[tuple[int, int]]) -> dict[str, Stages | None]:
    """Dense, and a new router at the shares of 576 tokens and 32 layers that these settings (T, L) have."""
    cases: dict[str, Stages | None] = {DENSE: None}
    for tokens, layers in settings:
        kept = {"keep_tokens": round(tokens / 576 * size.side**2), "keep_layers": round(layers / 32 * size.layers)}
        cases["T={keep_tokens}, L={keep_layers}".format(**kept)] = [{"use": "par", "weights": None, "seed": 0, **kept}]
    return cases


def _measured(model: Any, cases: Mapping[str, Stages | None], inputs: Mapping[str, Any], rounds: int) -> dict[str, Any]:
    """Rows by case: FLOPs, prefill time, decoding time and KV bytes as fractions of dense, times with quartiles.

    KV is counted from the cache itself.
    """
    arguments: Any = dict(inputs)
    prefill = timing.interleaved(
        {name: partial(workload.prefill, model, listed(stages), arguments) for name, stages in cases.items()}, rounds
    )
    decode = timing.interleaved(
        {name: partial(sections.decoding, model, listed(stages), arguments, STEPS) for name, stages in cases.items()},
        rounds,
    )
    held = {name: sections.memory_of(model, listed(stages), arguments)[1] for name, stages in cases.items()}
    rows = {}
    for name, stages in cases.items():
        if name == DENSE:
            continue
        rows[name] = {
            "flops": round(flops_of(model, stages, arguments), 5), "prefill": ratios(prefill[name], prefill[DENSE]),
            "decode": ratios(decode[name], decode[DENSE]), "kv": round(held[name] / held[DENSE], 5),
        }  # fmt: skip
        say(f"timed {name}: {rows[name]}")
    base = {"prefill": timing.median(prefill[DENSE]).cpu, "step": timing.median(decode[DENSE]).cpu / STEPS}
    return {"rounds": rounds, "dense_ms": {name: round(1e3 * value, 2) for name, value in base.items()}, "rows": rows}


def _stages(one: Pipeline) -> list[Any]:
    stages: list[Any] = yaml.safe_load(one.resolved)["stages"]
    return stages


def listed(stages: Stages | None) -> list[Any] | None:
    return None if stages is None else [dict(stage) for stage in stages]


@torch.inference_mode()
def flops_of(model: Any, stages: Stages | None, inputs: Any) -> float:
    return float(workload.report_of(model, listed(stages), inputs).cost.flops_fraction)


def ratios(own: Sequence[timing.Time], dense: Sequence[timing.Time]) -> list[float]:
    """Median and quartiles of the ratios of one round."""
    ratios = [mine.cpu / other.cpu for mine, other in zip(own, dense, strict=True)]
    if len(ratios) < 2:
        return [round(ratios[0], 4)] * 3
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return [round(one, 4) for one in (low, middle, high)]
