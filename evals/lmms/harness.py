"""One task through lmms-eval's evaluator, and what its results mean to us."""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from prunekit_evals.lmms import quiet
from prunekit_evals.lmms.tasks import Built
from prunekit_evals.run.answering import Tally, whole_fraction
from prunekit_evals.run.results import Saved

from prunekit.errors import PrunekitError

# lmms-eval's own default on its command line; through its API it would score a reasoning model's thoughts.
REASONING_TAGS = '[["<think>", "</think>"], ["<analysis>", "</analysis>"]]'


def evaluate(model: Any, built: Built, files: Path) -> dict[str, Any]:
    """One task through lmms-eval's `simple_evaluate`, with its own metric code. What a task writes goes to `files`."""
    from lmms_eval.evaluator import simple_evaluate

    with quiet.harness():
        results = simple_evaluate(
            model=model,
            tasks=[built.task],
            task_manager=built.manager,
            batch_size=model.batch_size,
            limit=built.limit,
            bootstrap_iters=0,
            log_samples=True,
            verbosity="ERROR",
            distributed_executor_backend="torchrun" if model.world_size > 1 else "accelerate",
            cli_args=argparse.Namespace(
                output_path=str(files), process_with_media=False, reasoning_tags=REASONING_TAGS
            ),
        )
    if not isinstance(results, dict):
        raise PrunekitError("lmms-eval gave no results")
    return results


def metrics_of(reported: dict[str, Any]) -> dict[str, float]:
    """The numbers among what lmms-eval reports of a task; `N/A` and empty ones are left out."""
    return {
        name: float(value)
        for name, value in reported.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and "," in name
    }


def saved(tally: Tally) -> Saved | None:
    """Means over the questions, and fractions of the totals; None when nothing was reported."""
    facts = tally.facts
    if not facts:
        return None
    flops, dense_flops = sum(f.prefill_flops for f in facts), sum(f.dense_prefill_flops for f in facts)
    kv, dense_kv = sum(f.kv_bytes for f in facts), sum(f.dense_kv_bytes for f in facts)
    return Saved(
        visual_tokens=statistics.fmean(f.visual_tokens for f in facts),
        kept_tokens=statistics.fmean(f.kept_tokens for f in facts),
        prefill_flops=flops / len(facts),
        dense_prefill_flops=dense_flops / len(facts),
        flops_fraction=flops / dense_flops,
        kv_bytes=kv / len(facts),
        dense_kv_bytes=dense_kv / len(facts),
        kv_fraction=kv / dense_kv,
        whole_flops_fraction=whole_fraction(facts),
    )
