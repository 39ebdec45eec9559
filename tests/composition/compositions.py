"""Compositions of registered strategies: each runs exactly on a model, or is refused before it computes."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from strategy_options import options_for

import prunekit
from prunekit import SpecError, Unsupported, plugins
from prunekit.families.base import Parts
from prunekit.pipeline.build import Pipeline
from prunekit.pipeline.stage import Stage
from prunekit.strategy.declare import stage_keys
from prunekit.strategy.sites import ENCODER, PREFILL_END, Site
from prunekit.testing.tiny import TinyWords
from prunekit.verify.comparison import compared
from prunekit.verify.precision import Float64Throughout
from prunekit.verify.stock import StockRun, stock_run_of

STEPS, EXACT = 1, 1e-9
# What no refusal should hold: it is written for people.
RAW = re.compile(r"Traceback|\w+Error\b|object at 0x|<function|<lambda|NoneType|\bassert\b")


@dataclass(eq=False)
class Bench:
    """A tiny model with prompt batches for it. processor: that of all tiny models. folder: for files of options."""

    model: Any
    parts: Parts
    batches: Mapping[str, Mapping[str, Any]]
    folder: Path

    @cached_property
    def shape(self) -> prunekit.ModelShape:
        return self.parts.shape()

    @cached_property
    def options(self) -> dict[str, dict[str, Any]]:
        """What each strategy needs beside its name."""
        return options_for(self.shape, self.folder)

    @cached_property
    def _stock(self) -> dict[str, StockRun]:
        return {}

    def stock(self, batch: str) -> StockRun:
        """The stock model's own run of a batch."""
        if batch not in self._stock:
            with Float64Throughout():
                self._stock[batch] = stock_run_of(self.model, self.batches[batch], STEPS + 1)
        return self._stock[batch]

    @cached_property
    def suited(self) -> list[str]:
        """The strategies whose needs this model meets."""
        return [use for use in names() if not self._unbound(use)]

    def _unbound(self, use: str) -> str:
        try:
            prunekit.load({"stages": [self.stage(use, **budget(use))]}).bind(self.shape)
        except (SpecError, Unsupported) as error:
            return str(error)
        return ""

    def cuts_tower(self, data: Mapping[str, Any]) -> bool:
        """Whether something leaves before the decoder's input."""
        try:
            return any(cut.site.in_tower for cut in prunekit.load(data).bind(self.shape).cuts)
        except (SpecError, Unsupported):
            return False

    def stage(self, use: str, **keys: Any) -> dict[str, Any]:
        """A stage as a pipeline file has it."""
        return {"use": use, **self.options.get(use, {}), **keys}

    def refusal(self, data: Mapping[str, Any], batch: str) -> str:
        """Why a pipeline is refused; empty if it ran exactly. AssertionError if it did neither."""
        try:
            self.run(prunekit.load(data), batch)
        except (SpecError, Unsupported) as error:
            message = str(error)
            assert not RAW.search(message), message
            assert len(message) > 40, message
            assert re.search(r"stages\[\d\]|^positions:", message), f"names no part of the pipeline: {message}"
            assert not vars(self.parts.base).keys() & {"forward", "__prunekit_attached__"}, "not taken off"
            return message
        return ""

    def run(self, pipeline: Pipeline, batch: str) -> None:
        """Raises AssertionError where it is not exact."""
        stock = self.stock(batch) if self.parts.opaque is None else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", prunekit.PrunekitWarning)
            compared(
                self.model, self.parts, pipeline, self.batches[batch], STEPS, EXACT, stock_run=stock,
                processor=TinyWords(),
            )  # fmt: skip


def names() -> list[str]:
    """All registered strategies."""
    return [entry.name for entry in plugins.registry().strategies()]


def budget(use: str, keep: float = 0.5) -> dict[str, Any]:
    """How much a stage of the strategy leaves, where it takes that."""
    keys = stage_keys(plugins.registry().get_strategy(use))
    return {name: value for name, value in (("keep", keep), ("keep_layers", 4)) if name in keys}


def built(bench: Bench, use: str) -> Stage:
    """A stage of a strategy alone."""
    return prunekit.load({"stages": [bench.stage(use, **budget(use))]}).stages[0]


def placed(bench: Bench, use: str) -> Site | None:
    """Where it acts first when nothing is said; None for what decides about layers alone."""
    stage = built(bench, use)
    if not stage.cuts_tokens:
        return None
    return next(iter(stage.placements(bench.shape.layers, bench.shape.tower_depth) or ()))[0]


def group(bench: Bench, use: str) -> str:
    """pixels, tower, encoder, decoder, router or layers: in which part of the way of the data it decides."""
    stage = built(bench, use)
    if stage.is_router:
        return "router"
    site = placed(bench, use)
    if site is None:
        return "layers"
    if site.place == "pixels":
        return "pixels"
    return "tower" if site.in_tower else "encoder" if site == ENCODER else "decoder"


def pairs(bench: Bench) -> Iterator[tuple[str, str]]:
    """Two strategies of different groups each, in the order of the data where both cut."""
    order = ("pixels", "tower", "encoder", "router", "decoder", "layers")
    groups = {use: group(bench, use) for use in names()}
    ranked = sorted(groups, key=lambda use: (order.index(groups[use]), use))
    for number, first in enumerate(ranked):
        yield from ((first, second) for second in ranked[number + 1 :] if groups[second] != groups[first])


def together(bench: Bench, first: str, second: str) -> dict[str, Any]:
    """Both in one pipeline, each where it acts when nothing is said; the later one keeps less."""
    ordered = sorted((first, second), key=lambda use: placed(bench, use) or PREFILL_END)
    stages = [bench.stage(use, **budget(use, keep)) for use, keep in zip(ordered, (0.75, 0.3), strict=True)]
    return {"name": f"{first}-and-{second}", "stages": stages}


def alone(data: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """Every stage of a pipeline as one of its own."""
    return [{**data, "stages": [stage]} for stage in data["stages"]]
