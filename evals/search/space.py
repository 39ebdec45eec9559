"""What is searched: strategies, each with the values that its sites, its `keep` and its options may take.

Where a search does not say, values follow from the strategy's declaration and the types of its fields: every site that
it allows in the decoder or at its input, both values of a flag, every word of a choice. Numbers, text and files stay at
their defaults. A candidate is the stages of a pipeline file, plain data.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args, get_origin, get_type_hints

from prunekit.strategy import declare
from prunekit.strategy.about import about
from prunekit.strategy.decisions import ModelShape

SEED = "seed"  # another draw of the same pipeline, which is luck and nothing to search for
KEEPS = (0.2, 0.9, 0.05)  # of the tokens that reach a stage, where another stage comes behind it


class Draws(Protocol):
    """Who chooses: a trial of optuna."""

    def suggest_categorical(self, name: str, choices: Sequence[str]) -> Any:
        """One of the choices."""

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        """A whole number."""

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        """A number."""


class Domain(Protocol):
    """The values that something may take."""

    def draw(self, trial: Draws, name: str) -> Any:
        """One of them; None leaves it out."""

    def ends(self) -> tuple[Any, ...]:
        """Those that show whether all are right, the usual one first."""


@dataclass(frozen=True)
class Choices:
    """One of these values, of any kind."""

    values: tuple[Any, ...]

    def draw(self, trial: Draws, name: str) -> Any:
        """One is no choice, and takes none of the search's dimensions."""
        if len(self.values) == 1:
            return self.values[0]
        labels = [json.dumps(value) for value in self.values]
        return self.values[labels.index(trial.suggest_categorical(name, labels))]

    def ends(self) -> tuple[Any, ...]:
        """All."""
        return self.values


@dataclass(frozen=True)
class Range:
    """A number from `low` to `high`, both included, whole where all three are; step: between values, None for any."""

    low: float
    high: float
    step: float | None = None
    log: bool = False

    def draw(self, trial: Draws, name: str) -> int | float:
        """Rounded to what a file shows."""
        low, high, step = self.low, self.high, self.step
        if isinstance(low, int) and isinstance(high, int) and isinstance(step, int | None):
            return trial.suggest_int(name, low, high, step=step or 1, log=self.log)
        return round(trial.suggest_float(name, low, high, step=step, log=self.log), 6)

    def ends(self) -> tuple[Any, ...]:
        """The least and the most."""
        return self.low, self.high


@dataclass(frozen=True)
class Sites:
    """One of these sites by name, or before one of the layers from `first` to `last`."""

    named: tuple[str, ...]
    first: int
    last: int

    def draw(self, trial: Draws, name: str) -> str | int:
        """As a file writes it."""
        place = Choices((*self.named, "layer")).draw(trial, name)
        return place if place != "layer" else trial.suggest_int(f"{name}.layer", self.first, self.last)

    def ends(self) -> tuple[Any, ...]:
        """Each name, and the first and the last layer."""
        return (*self.named, self.first, self.last)


@dataclass(frozen=True)
class Run:
    """Neighbouring layers, from `first` to `last` at most, at most `most` of them."""

    first: int
    last: int
    most: int

    def draw(self, trial: Draws, name: str) -> list[int]:
        """Their numbers."""
        count = trial.suggest_int(f"{name}.count", 1, self.most)
        start = min(trial.suggest_int(f"{name}.from", self.first, self.last), self.last + 1 - count)
        return list(range(start, start + count))

    def ends(self) -> tuple[Any, ...]:
        """The first one alone, and as many as there may be."""
        return [self.first], list(range(self.first, self.first + self.most))


@dataclass(frozen=True)
class Searched:
    """One strategy. layer: it decides about layers alone, and takes no turn among the token stages.

    values: key of a stage -> what it may be.
    """

    use: str
    layer: bool
    values: Mapping[str, Domain]

    def draw(self, trial: Draws, prefix: str) -> dict[str, Any]:
        """A stage of it."""
        drawn = {key: domain.draw(trial, f"{prefix}{self.use}.{key}") for key, domain in self.values.items()}
        return {"use": self.use, **{key: value for key, value in drawn.items() if key != "at" or value is not None}}


@dataclass(frozen=True)
class Space:
    """Strategies, and how many token stages a candidate may have at most. Each layer strategy is in it, or is not."""

    strategies: tuple[Searched, ...]
    most: int

    def draw(self, trial: Draws) -> list[dict[str, Any]]:
        """The stages of a candidate, those about tokens in no particular order; empty where no layer strategy is drawn
        and there are no others.
        """
        tokens = {one.use: one for one in self.strategies if not one.layer}
        stages = []
        if tokens:
            count = Choices(tuple(range(1, self.most + 1))).draw(trial, "stages")
            for place in range(count):
                chosen = Choices(tuple(tokens)).draw(trial, f"stage{place}")
                stages.append(tokens[chosen].draw(trial, f"stage{place}."))
        for one in self.strategies:
            if one.layer and Choices((False, True)).draw(trial, one.use):
                stages.append(one.draw(trial, ""))
        return stages


def searched(use: str, cls: type[Any], declared: Mapping[str, Domain], shape: ModelShape) -> Searched:
    """The values of a strategy: those declared, and for what is not, those that its declaration and fields allow.

    A field without a default that nothing is known of is left out; whoever builds a stage of it says so.
    """
    layer = "at" not in declare.stage_keys(cls)
    values: dict[str, Domain] = {}
    if not layer and "at" not in declared:
        values["at"] = _sites(cls, shape)
    if "keep" in declare.stage_keys(cls) and not {"keep", "keep_tokens"} & declared.keys():
        values |= {"keep": Range(*KEEPS), "keep_of": Choices(("current",))}
    values |= {name: domain for name, domain in _fields(cls, layer, shape) if name not in declared}
    return Searched(use, layer, {**values, **declared})


def _sites(cls: type[Any], shape: ModelShape) -> Domain:
    """Of one without a schedule, the decoder's input and its layers; else, and in front of those, its own sites."""
    declaration = cls.__prunekit__
    own = Choices((None,))
    if declaration.schedule is not None or not {"encoder", "decoder"} & {*about(cls).sites}:
        return own
    try:
        sites = declaration.sites_of(cls())
    except (TypeError, ValueError):  # of an option without a default, on which its sites may depend
        return own
    named = ("encoder",) if sites.encoder else ()
    first = max(sites.lowest, 1)
    if not (sites.decoder and "before" in sites.points and first < shape.layers):
        return Choices(named) if named else own
    return Sites(named, first, shape.layers - 1)


def _fields(cls: type[Any], layer: bool, shape: ModelShape) -> Iterator[tuple[str, Domain]]:
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind = hints[field.name]
        if not field.init or field.name == SEED:
            continue
        if kind is bool:
            yield field.name, Choices((field.default, not field.default))
        elif get_origin(kind) is Literal:
            yield field.name, Choices(tuple(sorted(get_args(kind), key=lambda value: value != field.default)))
        elif layer and kind == tuple[int, ...] and field.default is dataclasses.MISSING:
            yield field.name, Run(1, shape.layers - 1, max(1, shape.layers // 4))
