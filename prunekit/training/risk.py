"""Calibration of a budget of risk: on which rung of the ladder each prompt's answer first differs, and how that was
predicted. `prunekit.pipeline.risk` says what follows from it.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prunekit.engine.attach import Attached
from prunekit.errors import InputError
from prunekit.families.base import Parts
from prunekit.pipeline import risk
from prunekit.pipeline.build import Pipeline
from prunekit.records import RunReport
from prunekit.spec.risk_keys import RiskBudget
from prunekit.strategy.artefact import Artefact
from prunekit.training.data import Source, encode, order
from prunekit.verify.proof import proved_parts
from prunekit.version import VERSION


@dataclass(frozen=True)
class Climbed:
    """One prompt on every rung of a ladder, first on the dense one.

    harms: predicted for each rung, 0 for the dense one, not falling. dense: the answer of the model itself, token ids;
    answers: those on the rungs. flops: of the prefill, as fractions of the dense model's, with what decisions take.
    """

    harms: tuple[float, ...]
    dense: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]
    flops: tuple[float, ...]

    @property
    def differs(self) -> tuple[bool, ...]:
        """On each rung, whether the answer is another one than that of the model itself."""
        return tuple(answer != self.dense for answer in self.answers)

    @property
    def critical(self) -> float:
        """The harm predicted for the first rung on which the answer differs; infinity where it differs on none."""
        first = next((rung for rung, differs in enumerate(self.differs) if differs), None)
        return math.inf if first is None else self.harms[first]


def calibrate_risk(
    pipeline: Pipeline, model: Any, processor: Any, data: Source, prompts: int, *, max_new_tokens: int, seed: int = 0,
    model_id: str, name: str,
) -> Artefact:  # fmt: skip
    """The artefact of a pipeline with a budget of risk, on so many prompts of `data`, drawn with `seed`.

    max_new_tokens: of the greedy answers that are compared. model_id: names the weights. name: of the data.
    Raises InputError for fewer prompts than can certify anything, or than there are, and for a pipeline that changes
    answers without pruning.
    """
    budget = budget_of(pipeline)
    if prompts < (least := risk.least_prompts(budget.risk, budget.confidence)):
        promise = f"a risk of {budget.risk:g} with confidence {budget.confidence:g}"
        raise InputError(f"{prompts} prompts can certify no pruning at {promise} (ask for at least {least}: --prompts)")
    if prompts > len(data):
        raise InputError(f"'{name}' has {len(data)} prompts, not {prompts} (ask for fewer with --prompts)")
    parts = proved_parts(model)
    shape = parts.shape()
    drawn = (encode(processor, [data[index]]) for index in order(len(data), seed, prompts))
    rows = list(climb(pipeline, model, processor, parts, drawn, max_new_tokens))
    _check_dense(pipeline, sum(row.differs[0] for row in rows), risk.allowed(prompts, budget.risk, budget.confidence))
    about = {"id": model_id, "family": shape.family, "layers": shape.layers, "hidden": shape.hidden}
    used = {"name": name, "digest": data.digest, "prompts": prompts, "seed": seed}
    told = {"dtype": dtype_of(model), "max_new_tokens": max_new_tokens, **budget.ladder_data()}
    told["agreement"] = [1 - sum(column) / prompts for column in zip(*(row.differs for row in rows), strict=True)][1:]
    result = risk.result_of(pipeline.base, [row.critical for row in rows], told)
    return Artefact(VERSION, risk.KIND, about, used, result)


def _check_dense(pipeline: Pipeline, differ: int, allowed: int) -> None:
    """Raise InputError where answers differ even if everything is kept, so often that running dense is no way out."""
    if differ >= allowed:
        raise InputError(
            f"with everything kept, {differ} answers under '{pipeline.name}' differ from the model's own (its strategy "
            "changes what it keeps, so that no sample could run dense; use another one)"
        )


def budget_of(pipeline: Pipeline) -> RiskBudget:
    """Its budget of risk. Raises InputError for a pipeline without one."""
    if not isinstance(pipeline.budget, RiskBudget):
        raise InputError(f"'{pipeline.name}' has no budget of risk (write `budget: {{risk: 0.05}}`)")
    return pipeline.budget


def dtype_of(model: Any) -> str:
    """`float32`"""
    return str(model.dtype).removeprefix("torch.")


def climb(
    pipeline: Pipeline, model: Any, processor: Any, parts: Parts, batches: Iterable[Mapping[str, Any]], most: int
) -> Iterator[Climbed]:
    """What each prompt of some batches of model inputs does on every rung of the pipeline's ladder.

    most: tokens of an answer. On the dense rung the pipeline runs with a risk of 0, and predicts what the others do.
    """
    budget = budget_of(pipeline)
    rungs = (dataclasses.replace(pipeline, budget=dataclasses.replace(budget, risk=0.0)), *pipeline.rungs()[1:])
    for inputs in batches:
        given = {
            key: value.to(model.device, model.dtype if value.is_floating_point() else None)
            if isinstance(value, Tensor) else value
            for key, value in inputs.items()
        }  # fmt: skip
        dense, answers = _answers(model, given, most), []
        reports: list[RunReport] = []
        for rung in rungs:
            with Attached(model, rung, parts, processor, observed=False) as run:
                answers.append(_answers(model, given, most))
            assert run.report is not None
            reports.append(run.report)
        harms, flops = _harms(reports[0]), [_flops(report) for report in reports]
        for row, one in enumerate(dense):
            columns = tuple(answer[row] for answer in answers), tuple(cost[row] for cost in flops)
            yield Climbed((0.0, *harms[row]), one, *columns)


def _harms(report: RunReport) -> tuple[tuple[float, ...], ...]:
    """Predicted for each prompt. Raises InputError for one without visual tokens, about which nothing is predicted."""
    if not all(report.harms):
        raise InputError("a calibration prompt has no visual tokens (name data whose prompts all have images)")
    return report.harms


def _flops(report: RunReport) -> list[float]:
    """Of each prompt's prefill, as fractions of the dense model's."""
    pairs = zip(report.cost.prefill_flops, report.cost.dense_prefill_flops, strict=True)
    return [spent / dense for spent, dense in pairs]


@torch.no_grad()
def _answers(model: Any, inputs: Mapping[str, Any], most: int) -> list[tuple[int, ...]]:
    """Greedy answers as token ids, up to where they end."""
    output: Tensor = model.generate(**inputs, max_new_tokens=most, do_sample=False, num_beams=1)
    ends = model.generation_config.eos_token_id
    stops = frozenset(ends if isinstance(ends, list) else [ends])
    rows = output[:, inputs["input_ids"].shape[1] :].tolist()
    return [tuple(itertools.takewhile(lambda token: token not in stops, row)) for row in rows]
