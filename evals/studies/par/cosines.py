"""How much decoder layers turn the states that pass them: cosines of what enters and what leaves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from prunekit_evals.run.stamp import TASKS
from prunekit_evals.studies.par import asked
from prunekit_evals.studies.par.cells import Bench
from torch import Tensor
from torch.nn.functional import cosine_similarity

import prunekit
from prunekit import families
from prunekit.pipeline.build import Pipeline

A_TASK = 10  # questions; each is run by itself, so that no padding takes part


@contextmanager
def _watched(layers: Sequence[Any]) -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
    """What entered and left each layer that ran last, float (S, H) each."""
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def note(layer: int) -> Any:
        def hook(_: Any, given: tuple[Any, ...], named: dict[str, Any], out: Any) -> None:
            entered = given[0] if given else named["hidden_states"]
            seen[layer] = entered[0], (out if isinstance(out, Tensor) else out[0])[0]

        return hook

    handles = [layer.register_forward_hook(note(i), with_kwargs=True) for i, layer in enumerate(layers)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _questions(bench: Bench) -> list[asked.Batch]:
    each = [(task, item) for task in TASKS for item in bench.items[task][:A_TASK]]
    return [batch for task, item in each for batch in asked.batches(bench.loaded, [item], task)]


def of_layers(bench: Bench, pipelines: Sequence[Pipeline]) -> list[list[list[float]]]:
    """For each pipeline and question the mean cosine over the tokens that run in a layer, layer by layer."""
    parts = families.find(bench.loaded.model)
    cosines: list[list[list[float]]] = [[] for _ in pipelines]
    for batch in _questions(bench):
        visual = torch.isin(batch.inputs["input_ids"][0], torch.tensor(parts.visual_ids))
        for rows, one in zip(cosines, pipelines, strict=True):
            with torch.inference_mode(), _watched(parts.layers) as seen, prunekit.apply(bench.loaded.model, one) as run:
                bench.loaded.model(**batch.inputs, use_cache=True)
                stays = ~visual
                events = run.report.events if run.report else ()
                kept = torch.tensor(events[-1].kept[0] if events else range(int(visual.sum())))
                stays[visual.nonzero()[kept, 0]] = True
                rows.append([_mean(*seen[layer], stays) for layer in range(len(parts.layers))])
    return cosines


def _mean(entered: Tensor, left: Tensor, stays: Tensor) -> float:
    """The cut stands inside the first layer behind it: what enters that one is longer than what leaves."""
    same = entered if len(entered) == len(left) else entered[stays]
    return float(cosine_similarity(same.float(), left.float(), dim=-1).mean())


def of_pairs(bench: Bench) -> list[float]:
    """The mean cosine of what enters a layer and leaves the next one in the dense model, for each such pair."""
    layers = families.find(bench.loaded.model).layers
    totals = torch.zeros(len(layers) - 1)
    questions = _questions(bench)
    for batch in questions:
        with torch.inference_mode(), _watched(layers) as seen:
            bench.loaded.model(**batch.inputs)
        for first in range(len(totals)):
            totals[first] += cosine_similarity(seen[first][0].float(), seen[first + 1][1].float(), dim=-1).mean()
    return [float(total) / len(questions) for total in totals]
