"""From drawn stages to a pipeline at the budget, or the reason why there is none."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prunekit import plugins
from prunekit.errors import Fault, PrunekitWarning, SpecError
from prunekit.pipeline import budget as budgets
from prunekit.pipeline.build import Pipeline, build
from prunekit.spec import places
from prunekit.spec.budget_keys import Budget
from prunekit.strategy import declare
from prunekit.strategy.decisions import ModelShape
from prunekit.strategy.options import BUDGETS
from prunekit.strategy.sites import ENCODER, Site

CANDIDATE = "candidate"  # what all are called while they are compared, so that equal ones have one hash
NUMBER = re.compile(r"\d+(\.\d+)?")


class Infeasible(Exception):
    """These stages make no pipeline within the budget on this model."""


@dataclass
class Refusals:
    """Why candidates were infeasible: how often for each reason, reasons that differ in numbers being one, and the
    first of each as it was said.
    """

    counts: dict[str, int] = field(default_factory=dict)
    said: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str) -> None:
        """One more."""
        kind = NUMBER.sub("#", reason)
        self.counts[kind] = self.counts.get(kind, 0) + 1
        self.said.setdefault(kind, reason)

    def listed(self) -> list[tuple[int, str]]:
        """The most frequent first."""
        return sorted(((count, self.said[kind]) for kind, count in self.counts.items()), key=lambda one: -one[0])


@dataclass(frozen=True)
class Fitter:
    """Brings stages to one cost on one model.

    budget: for prompts of its numbers of tokens; its `visual_tokens` are known, or the model's are.
    """

    shape: ModelShape
    budget: Budget

    def fit(self, stages: Sequence[Mapping[str, Any]], name: str = CANDIDATE, **top: Any) -> Pipeline:
        """The stages in the order of the data, how much the last one keeps left to the budget.

        top: other keys of the file. A stage that takes no `keep`, or is alone with what it does to layers, counts as it
        is. Raises Infeasible, with the reason.
        """
        try:
            data = [dict(one) for one in sorted(stages, key=self._first)]
            taking = [one for one in data if _takes_keep(one)]
            for key in BUDGETS if taking else ():
                taking[-1].pop(key, None)
            budget = {"budget": self.budget.as_data()} if taking else {}
            pipeline = build({"name": name, **top, **budget, "stages": places.escaped(data)})
            self._check(pipeline, bool(taking))
        except SpecError as error:
            raise Infeasible("; ".join(map(_told, error.faults))) from error
        return pipeline

    def of(self, pipeline: Pipeline, name: str = CANDIDATE) -> Pipeline:
        """Another pipeline's stages at the budget. Raises Infeasible."""
        data = places.parse(pipeline.resolved, pipeline.source, [])
        plain = data.plain() if data is not None else {}
        top = {key: value for key, value in plain.items() if key not in ("name", "budget", "stages")}
        return self.fit(plain["stages"], name, **top)

    def _first(self, stage: Mapping[str, Any]) -> tuple[bool, Site]:
        """Where it acts first; what acts on layers alone comes behind."""
        keep = {"keep": 1.0} if _takes_keep(stage) and not {*BUDGETS} & stage.keys() else {}
        (one,) = build({"stages": [places.escaped({**stage, **keep})]}).stages
        placed = one.placements(self.shape.layers, self.shape.tower_depth) if one.cuts_tokens else None
        return (False, placed[0][0]) if placed else (True, ENCODER)

    def _check(self, pipeline: Pipeline, opened: bool) -> None:
        """Bind it. Raises SpecError where that cannot be, and Infeasible for what costs more or does nothing."""
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always", PrunekitWarning)
            bound = pipeline.bind(self.shape)
        idle = [one for one in warned if issubclass(one.category, PrunekitWarning)]
        if idle:
            raise Infeasible(str(idle[0].message).removeprefix(f"{pipeline.name}: "))
        if not bound.acts:
            raise Infeasible("it prunes nothing")
        original = self.budget.visual_tokens or self.shape.visual_tokens
        if (
            not opened
            and original is not None
            and (cost := budgets.spent(bound, self.budget, original)) > (self.budget.fraction)
        ):
            raise Infeasible(f"it takes no `keep` and costs up to {cost:.4g}, more than {self.budget.fraction:g}")


def described(pipeline: Pipeline) -> str:
    """A pipeline in one line: `divprune at encoder keep 0.5, fastv at 4 rope false`."""
    read = places.parse(pipeline.resolved, pipeline.source, [])
    stages = read.plain()["stages"] if read is not None else []
    return ", ".join(" ".join([one.pop("use"), *(f"{key} {_short(one[key])}" for key in one)]) for one in stages)


def _short(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value).replace(" ", "")


def _told(fault: Fault) -> str:
    return f"{fault.key}: {fault.message}" if fault.key else fault.message


def _takes_keep(stage: Mapping[str, Any]) -> bool:
    return "keep" in declare.stage_keys(plugins.registry().get_strategy(stage["use"]))
