"""Which pipelines stand in the table of the bundled model: every strategy alone, at three shares and as it comes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import prunekit
from prunekit import plugins
from prunekit.errors import PrunekitError
from prunekit.pipeline.build import Pipeline
from prunekit.strategy import declare
from prunekit.strategy.about import About, about
from prunekit.strategy.decisions import ModelShape

SHARES = (0.5, 0.25, 0.11)
FIRST = (0.25, 0.11, 0.5, None)  # in which order they are measured, behind the baselines
# What strategies take on the bundled model, whose decoder has eight layers.
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "par": {"weights": "micro"},
    "skip_layers": {"layers": [5, 6]},
    "freeze_layers": {"layers": [4, 5, 6, 7]},
    "shortgpt": {"drop": 2},
}
CLIP = "needs the text tower of the CLIP model that the vision tower was taken from; the bundled one has none"


@dataclass(frozen=True)
class Wanted:
    """One row. share: of the visual tokens that stay; None: as the strategy comes."""

    strategy: str
    share: float | None
    pipeline: Pipeline

    @property
    def turn(self) -> tuple[bool, int, str]:
        """When it is measured: what others are compared with comes first."""
        told = about(plugins.registry().get_strategy(self.strategy))
        return told.group != "baselines", FIRST.index(self.share), self.strategy

    @property
    def label(self) -> str:
        """As the row is kept."""
        return self.strategy if self.share is None else f"{self.strategy} {self.share:g}"


# Gives the file with what `prunekit calibrate` finds for a stage.
Calibrate = Callable[[Mapping[str, Any]], Path]


def wanted(
    shape: ModelShape, calibrate: Calibrate | None = None, only: Sequence[str] = ()
) -> Iterator[Wanted | tuple[str, str]]:
    """Rows of every registered strategy on a model with these numbers; of one that cannot run, its name and why.

    calibrate: for strategies that cannot do without; None: they are left out. only: these strategies, if any is named.
    """
    for entry in plugins.registry().strategies():
        if only and entry.name not in only:
            continue
        cls = plugins.registry().get_strategy(entry.name)
        rows: list[Wanted] = []
        reason = ""
        told = about(cls)
        for share, stage in stages(entry.name, cls, told):
            built = fitting(stage, shape)
            if isinstance(built, str) and "calibration" in built and told.calibrated and calibrate is not None:
                built = fitting({**stage, "calibration": str(calibrate(stage))}, shape)
            if isinstance(built, str):
                reason = reason or built
            else:
                rows.append(Wanted(entry.name, share, built))
        yield from rows
        if not rows:
            yield entry.name, reason


def stages(
    name: str, cls: type[Any], told: About, options: Mapping[str, Mapping[str, Any]] = OPTIONS
) -> Iterator[tuple[float | None, dict[str, Any]]]:
    """The stages of a strategy, by share: with a budget where it takes one, by itself where it has a way of its own.

    options: of some strategies, by name.
    """
    base: dict[str, Any] = {"use": name, **options.get(name, {})}
    if any(field.name == "scale" for field in dataclasses.fields(cls)) and told.kind == "image":
        for share in SHARES:
            yield share, {**base, "scale": round(math.sqrt(share), 3)}
        return
    if "keep" in declare.stage_keys(cls):
        for share in SHARES:
            yield share, {**base, "keep": share}
    if not (
        "keep" in declare.stage_keys(cls) and cls.__prunekit__.keep == "required" and not cls.__prunekit__.schedule
    ):
        yield None, base


def fitting(stage: Mapping[str, Any], shape: ModelShape) -> Pipeline | str:
    """The stage as a pipeline that fits a model with these numbers, or why there is none, in one line."""
    try:
        built = prunekit.load({"name": stage["use"], "stages": [dict(stage)]})
        built.bind(shape)
    except PrunekitError as error:
        text = str(error).strip().splitlines()[-1].strip()
        return CLIP if ".clip: is missing" in text else text.partition("stages[0].")[2] or text
    return built
