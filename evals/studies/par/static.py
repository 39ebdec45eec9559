"""Which layers a static baseline leaves out: the best nested list that can be found without the benchmark."""

from __future__ import annotations

from collections.abc import Callable

from prunekit_evals.studies.par.cells import Bench, pipeline

from prunekit.pipeline.build import Pipeline

QUESTIONS = 120


def greedy(bench: Bench, use: str, enough: Callable[[Pipeline], bool]) -> list[int]:
    """Layers in the order in which a strategy takes them, each the one whose loss hurts calibration least.

    use: `skip_layers` or one with the same option. enough: told of each pipeline that is chosen; True ends the search.
    """
    order: list[int] = []
    while len(order) < bench.shape.layers:
        rest = [layer for layer in range(bench.shape.layers) if layer not in order]
        tried = [pipeline([{"use": use, "layers": sorted([*order, layer])}]) for layer in rest]
        scores = bench.on_calibration(tried, QUESTIONS)
        best = max(range(len(rest)), key=lambda n: (scores[n], rest[n]))  # among equals the deepest
        order.append(rest[best])
        if enough(tried[best]):
            break
    return order
