"""`assert_equivalent`: one call that proves a pipeline exact on a model, for authors of strategies."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from prunekit.pipeline.build import Pipeline, build
from prunekit.verify.comparison import Equivalence, Merges, compared, generate
from prunekit.verify.proof import proved_parts
from prunekit.verify.stock import StockRun

__all__ = ["Equivalence", "assert_equivalent", "generate"]


def assert_equivalent(
    model: PreTrainedModel,
    pipeline: Pipeline | Mapping[str, Any] | Path | str,
    inputs: Mapping[str, Tensor],
    steps: int = 8,
    atol: float = 1e-9,
    merges: Merges | None = None,
    stock_run: StockRun | None = None,
    processor: Any = None,
    **options: Any,
) -> Equivalence:
    """Prefill and `steps` decode steps of the pruned model equal the masked reference; AssertionError if they do not.

    The pruned model decodes with its cache; the reference is given the same tokens and replays the decisions of the
    run's report. Compared are every logit, the report's token and KV counts with those that follow from its decisions,
    the KV that the cache really holds, and the model before and after.

    model: a stock model in eval mode; in float64 unless `atol` is 1e-6 or more. In float64 both sides run under
        `Float64Throughout`, which takes out what such a model still rounds to float32 (RMSNorm, eager
        softmax, generate's logits); without it the floor would be 1e-7.
    inputs: what `generate` takes, left-padded; `prunekit.testing.tiny_families` makes some for every family.
    merges: how events merged, from the report alone. None takes the weights that the strategy returned to the engine.
    stock_run: `prunekit.verify.stock.stock_run_of(model, inputs, steps + 1)`, to make it once for many pipelines.
    processor: as for `prunekit.apply`, for strategies that ask for `question`.
    options: for `generate`, such as `num_beams` (all beams of a row are returned and compared).
    Raises ValueError when the model is not in float64 and `atol` is below 1e-6.
    """
    built = pipeline if isinstance(pipeline, Pipeline) else build(pipeline)
    return compared(model, proved_parts(model), built, inputs, steps, atol, merges, stock_run, processor, **options)
