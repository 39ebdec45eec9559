"""One budget for a whole pipeline: how much the stages that the file leaves open may keep.

They share one multiplier m: each of their cuts leaves m of the visual tokens that reach it, rounded half up, at least
one. The solver takes the largest m whose cost is within the budget; the cost of whole numbers of tokens is exact.
"""

from __future__ import annotations

import dataclasses
import math
import warnings

from prunekit.errors import Fault, PrunekitWarning, SpecError
from prunekit.pipeline.bound import BoundPipeline
from prunekit.pipeline.cut import Cut
from prunekit.pipeline.forecast import Forecast, forecast, visual_counts
from prunekit.spec.budget_keys import Budget
from prunekit.strategy.sites import Keep


def solved(bound: BoundPipeline, budget: Budget) -> BoundPipeline:
    """The pipeline with a budget of tokens at every cut.

    Raises SpecError for a budget that cannot be met. Warns of a later stage that never acts, since it may keep more
    than the budget leaves it.
    """
    if not any(cut.stage.open for cut in bound.cuts):
        raise _error(budget, "", "no stage is left open", "leave out `keep` of one that takes it, or the budget")
    original = budget.visual_tokens or bound.shape.visual_tokens
    if original is None:
        message = "is missing: this model's number of visual tokens depends on the image"
        raise _error(budget, "visual_tokens", message, "name the number that the budget is for, such as 576")
    solution = _solution(bound, budget, original)
    for fault in _idle_faults(solution, original):
        warnings.warn(f"{bound.name}: {fault}", PrunekitWarning, stacklevel=4)
    return solution


def _solution(bound: BoundPipeline, budget: Budget, original: int) -> BoundPipeline:
    least = _with(bound, original, 0.0)
    if (lowest := spent(least, budget, original)) > budget.fraction:
        raise _out_of_reach(least, budget, original, lowest)
    low, high = 0.0, 1.0
    if spent(_with(bound, original, high), budget, original) <= budget.fraction:
        return _with(bound, original, high)
    while low < (middle := (low + high) / 2) < high:
        if spent(_with(bound, original, middle), budget, original) <= budget.fraction:
            low = middle
        else:
            high = middle
    return _with(bound, original, low)


def _with(bound: BoundPipeline, original: int, multiplier: float) -> BoundPipeline:
    """Each open cut with the fraction of the original tokens that the multiplier gives it."""
    cuts: list[Cut] = []
    for cut in bound.cuts:
        if cut.stage.open:
            entering = visual_counts(cuts, original)[-1]
            count = min(max(math.floor(multiplier * entering + 0.5), 1), entering)
            cut = dataclasses.replace(cut, keep=Keep(count / original))
        cuts.append(cut)
    return dataclasses.replace(bound, cuts=tuple(cuts))


def _idle_faults(bound: BoundPipeline, original: int) -> list[Fault]:
    """Cuts that an open stage before them leaves fewer tokens than they may keep, so that they never act."""
    faults: list[Fault] = []
    opened: Cut | None = None
    for cut, entering in zip(bound.cuts, visual_counts(bound.cuts, original), strict=False):
        if cut.stage.open:
            opened = cut
        elif opened and cut.keep and cut.keep.of == "original" and cut.keep.count(original, original) > entering:
            key = cut.key("keep" if cut.keep.tokens is None else "keep_tokens")
            message = f"asks for {cut.keep}, but with this budget {opened.label} leaves {entering} of {original} tokens"
            faults.append(cut.stage.fault(key, message, "keep less here, leave it out, or allow a larger budget"))
    return faults


def spent(bound: BoundPipeline, budget: Budget, original: int) -> float:
    """What the budget counts, as a fraction of the dense model's: the most that it can be, where it is not certain.

    original: the visual tokens of the prompt that the budget is for.
    """
    figures = _forecast(bound, budget, original)
    visual = [tokens - budget.text_tokens for tokens in figures.layer_tokens]
    if budget.of == "flops":
        return figures.flops[1] + figures.decisions
    if budget.of == "kv_bytes":
        return figures.kv[1]
    if budget.of == "layer_mean":
        return sum(visual) / (original * bound.shape.layers)
    return visual[-1] / original


def _forecast(bound: BoundPipeline, budget: Budget, original: int) -> Forecast:
    shape = dataclasses.replace(bound.shape, visual_tokens=original)
    figures = forecast(dataclasses.replace(bound, shape=shape), budget.text_tokens)
    assert figures is not None
    return figures


def _out_of_reach(least: BoundPipeline, budget: Budget, original: int, lowest: float) -> SpecError:
    """Of a budget that is below the cost with as little as can be kept; says so where deciding itself is what costs."""
    message = f"{budget.fraction:.4g} cannot be reached: with one token at every open stage it is still {lowest:.4g}"
    hint = "allow more, or let stages that are not open keep less"
    own = _forecast(least, budget, original).decisions if budget.of == "flops" else 0.0
    if own > lowest / 4:
        message += f", of which {own:.4g} is what stages take to decide"
        hint = "take a smaller router, such as one of less `width`, or allow more"
    return _error(budget, budget.of, message, hint)


def _error(budget: Budget, key: str, message: str, hint: str) -> SpecError:
    where = budget.places.get(key, budget.places.get(""))
    return SpecError([Fault(where, "budget" + (f".{key}" if key else ""), message, hint)])
