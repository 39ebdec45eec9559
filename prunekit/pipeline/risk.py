"""A budget of risk on a model: the rungs of its ladder, and the harm below which a calibration lets a sample take one.

Each calibration prompt has a critical harm: the one predicted for the first rung on which its answer differs from the
dense model's; none if it differs on no rung. A sample takes rungs while their predicted harm stays below a threshold,
so the answer of an exchangeable prompt differs only if its critical harm is below the threshold, too. The k-th smallest
critical harm of n prompts is such a threshold: the share of prompts below it exceeds `risk` with the probability of
fewer than k hits in n draws of that share, and k is the largest for which this stays within 1 - `confidence`. It is the
upper confidence bound of risk-controlling prediction sets (https://arxiv.org/abs/2101.02703) for a loss of 0 or 1, with
the exact binomial tail; taking the first differing rung makes the loss monotone, as that bound needs it.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from prunekit.errors import Fault, PrunekitWarning, SpecError
from prunekit.pipeline.bound import BoundPipeline, Ladder
from prunekit.pipeline.stage import Stage
from prunekit.spec.risk_keys import RiskBudget, Rung
from prunekit.strategy import declare
from prunekit.strategy.artefact import Artefact, read_artefact
from prunekit.strategy.decisions import ModelShape
from prunekit.strategy.sites import Keep

# What stands in an artefact in the place of a strategy.
KIND = "budget.risk"


def file_faults(stages: Sequence[Stage], budget: RiskBudget) -> Iterator[Fault]:
    """What a budget of risk asks of the stages of its pipeline, as far as it is seen without a model."""
    if len(stages) != 1:
        message = f"is for a pipeline of one stage, and this one has {len(stages)}"
        yield budget.fault("", message, "another stage prunes every sample alike, so that none could run dense")
        return
    (stage,) = stages
    if not stage.open or _named(stage):
        message = f"'{stage.use}' {_closed(stage)}"
        yield stage.fault(_named(stage) or "use", message, "remove it: `budget.ladder` says how much is kept")
    elif not stage.counts or declare.plans_layers_itself(type(stage.strategy)):
        message = f"'{stage.use}' decides by itself what stays, so that no sample could run dense"
        yield stage.fault("use", message, "use a strategy that keeps as much as it is told")
    elif "count" in stage.requests("score_tokens"):
        message = f"'{stage.use}' scores by how many tokens stay, which here follows from its scores"
        yield stage.fault("use", message, "use another strategy")
    elif not scores(stage):
        message = f"'{stage.use}' decides without scores, by which harm is predicted"
        yield stage.fault("use", message, "use a strategy that implements `score_tokens`, or a router that scores")
    layers = next((index for index, rung in enumerate(budget.ladder) if rung.layers), None)
    if layers is not None and "keep_layers" not in declare.stage_keys(type(stage.strategy)):
        key = f"ladder[{layers}].keep_layers"
        yield budget.fault(key, f"'{stage.use}' does not decide about layers", "leave it out, or use a router")
    sites = len(stage.sites_given or ())
    for index, rung in enumerate(budget.ladder):
        if len(rung.keeps) > 1 and len(rung.keeps) != max(sites, 1):
            message = f"names {len(rung.keeps)} amounts, and the stage {max(sites, 1)} sites in `at`"
            yield budget.fault(f"ladder[{index}]", message, "one for each site, or a single one for all")


def _named(stage: Stage) -> str:
    return next((key for key in ("keep", "keep_tokens", "keep_layers") if key in stage.keys), "")


def _closed(stage: Stage) -> str:
    return "says itself how much it keeps" if _named(stage) else "takes no `keep` that a ladder could set"


def scores(stage: Stage) -> bool:
    """It decides by scores: a router, or a strategy whose selection asks for them."""
    return stage.is_router or "scores" in stage.requests("select_tokens")


def rung_stages(stage: Stage, budget: RiskBudget) -> tuple[Stage, ...]:
    """The stage on each rung, with fixed budgets: first the dense one, on which it keeps all."""
    layers = any(rung.layers for rung in budget.ladder)
    every = (Rung((Keep(1.0),), Keep(1.0) if layers else None), *budget.ladder)
    return tuple(
        dataclasses.replace(
            stage, open=False, keeps=rung.keeps or every[0].keeps, keep_layers=rung.layers or every[0].layers
        )
        for rung in every
    )


def with_ladder(budget: RiskBudget, rungs: Sequence[BoundPipeline], base: str, source: str) -> BoundPipeline:
    """The first of `rungs`, the dense one, with all of them as its ladder.

    base: of the pipeline, without what a calibration does not depend on. source: the pipeline file, for messages.
    Raises SpecError for a calibration that is missing, or of another model or pipeline. Warns of one that certifies
    nothing.
    """
    if any(cut.site.in_tower for cut in rungs[0].cuts):
        (stage, *_) = rungs[0].stages
        message = "decides inside the vision tower, where each image is a sample of its own; a risk is that of a prompt"
        raise SpecError([stage.fault("at", message, "let it cut at `encoder` or later")])
    found = _calibration(budget, rungs[0].shape, base, source) if budget.risk else None
    limit = 0.0 if found is None else threshold(critical_of(found), budget.risk, budget.confidence)
    if found is not None and limit == 0:
        warnings.warn(f"{rungs[0].name}: {uncertified(budget, found)}", PrunekitWarning, stacklevel=5)
    return dataclasses.replace(rungs[0], ladder=Ladder(tuple(rungs), limit, found))


def uncertified(budget: RiskBudget, found: Artefact) -> str:
    """That a calibration lets nothing be pruned."""
    prompts, needed = len(critical_of(found)), least_prompts(budget.risk, budget.confidence)
    told = f"a risk of {budget.risk:g} needs at least {needed}" if prompts < needed else "too many answers differ"
    return (
        f"no pruning is certified at a risk of {budget.risk:g} with confidence {budget.confidence:g} by its {prompts} "
        f"calibration prompts ({told}): every sample runs dense"
    )


def _calibration(budget: RiskBudget, shape: ModelShape, base: str, source: str) -> Artefact:
    out = budget.calibration or "risk.json"
    make = f"prunekit calibrate {source} --model MODEL --data DATA --prompts N --out {out}"
    needed = f"make it: {make}, with N at least {least_prompts(budget.risk, budget.confidence)}"
    if budget.calibration is None:
        raise SpecError([budget.fault("calibration", f"is missing: the risk has to be measured; {needed}")])
    try:
        found = read_artefact(budget.calibration, KIND)
    except ValueError as error:
        raise SpecError([budget.fault("calibration", str(error), needed)]) from error
    if (wrong := found.refusal(shape)) is not None:
        raise SpecError([budget.fault("calibration", f"does not fit: {wrong}", needed)])
    if found.result.get("pipeline") != base:
        message = f"is of another pipeline, {found.result.get('pipeline')}; this one, without its risk, is {base}"
        raise SpecError([budget.fault("calibration", message, needed)])
    return found


def result_of(base: str, critical: Sequence[float], told: dict[str, Any]) -> dict[str, Any]:
    """What an artefact holds: the pipeline, the critical harms in ascending order, None for no rung; and `told`."""
    ordered = [None if math.isinf(one) else one for one in sorted(critical)]
    return {"pipeline": base, **told, "critical": ordered}


def critical_of(found: Artefact) -> tuple[float, ...]:
    """The critical harms of its prompts, ascending; infinity for those whose answer differs on no rung."""
    return tuple(math.inf if one is None else float(one) for one in found.result["critical"])


def threshold(critical: Sequence[float], risk: float, confidence: float) -> float:
    """The harm below which rungs are taken; 0: no sample takes any.

    critical: ascending, one for each of n exchangeable calibration prompts.
    """
    return 0.0 if (k := allowed(len(critical), risk, confidence)) == 0 else critical[k - 1]


def allowed(prompts: int, risk: float, confidence: float) -> int:
    """The largest k for which fewer than k hits in so many draws of the share `risk` have a probability of at most
    1 - `confidence`; 0: there is none.
    """
    total, k = 0.0, 0
    while k < prompts:
        total += math.exp(_log_probability(k, prompts, risk))
        if total > 1 - confidence:
            break
        k += 1
    return k


def _log_probability(hits: int, draws: int, share: float) -> float:
    ways = math.lgamma(draws + 1) - math.lgamma(hits + 1) - math.lgamma(draws - hits + 1)
    return ways + hits * math.log(share) + (draws - hits) * math.log1p(-share)


def least_prompts(risk: float, confidence: float) -> int:
    """The fewest calibration prompts that can certify any pruning: none of them may differ."""
    return math.ceil(math.log(1 - confidence) / math.log1p(-risk))
