"""One pipeline file as several pipelines: values along a grid, seeds. Each is named by what differs from the file."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import yaml

import prunekit
from prunekit.errors import Fault, InputError, SpecError
from prunekit.pipeline.build import Pipeline
from prunekit.spec.compose import Source

KEY = re.compile(r"[A-Za-z_]\w*(?:\.\w+|\[\d{1,6}\])*")
UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")
SEED = "seed"  # the option whose value makes no other pipeline, only another draw of it
MOST = 10_000  # pipelines of one file


@dataclass(frozen=True)
class Variation:
    """How a pipeline is varied.

    overrides: for all variants, `key=value`. grid: by key the values that it takes; with several keys every
    combination. seeds: how many of a pipeline that draws at random. budget: overrides that no name tells of.
    """

    overrides: tuple[str, ...] = ()
    grid: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    seeds: int = 1
    budget: tuple[str, ...] = ()

    def points(self) -> list[tuple[str, ...]]:
        """The overrides of each variant."""
        values = [[f"{key}={value}" for value in values] for key, values in self.grid.items()]
        return [(*self.overrides, *point) for point in itertools.product(*values)]


@dataclass(frozen=True)
class Variant:
    """One of a pipeline's variants, and the overrides that make it of its source, those of a budget left out."""

    pipeline: Pipeline
    overrides: tuple[str, ...]


def expand(source: Source, variation: Variation) -> list[Variant]:
    """The variants of one pipeline, each once. Raises SpecError with the faults of all that cannot be built."""
    found: dict[str, Variant] = {}
    faults: dict[str, Fault] = {}
    for overrides in variation.points():
        try:
            found |= {one.pipeline.sha: one for one in _seeded(source, overrides, variation)}
        except SpecError as error:
            faults |= {str(fault): fault for fault in error.faults}
    if faults:
        raise SpecError(list(faults.values()))
    return list(found.values())


def suffix(overrides: Sequence[str]) -> str:
    """What a name says of overrides, such as `-keep-0.5`; of a key only as much as tells it from the others."""
    pairs = [(key, value) for key, value in map(_pair, overrides) if key != "name"]
    last = [re.findall(r"\w+", key)[-1] for key, _ in pairs]
    parts = []
    for (key, value), short in zip(pairs, last, strict=True):
        parts += [short if last.count(short) == 1 else UNSAFE.sub("-", ".".join(re.findall(r"\w+", key))), value]
    return "".join(f"-{UNSAFE.sub('-', part).strip('-') or 'none'}" for part in parts)


def renamed(overrides: Sequence[str], name: str) -> list[str]:
    """The overrides, for a pipeline of this name."""
    return [*(one for one in overrides if _pair(one)[0] != "name"), f"name='{name}'"]


def read_grid(texts: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """`KEY=V,V,...` texts of a command line; a comma in brackets or quotes separates nothing. Raises InputError."""
    grid: dict[str, tuple[str, ...]] = {}
    for text in texts:
        key, values = _pair(text)
        if not KEY.fullmatch(key) or "=" not in text:
            raise InputError(f"--grid '{text}' is not KEY=V,V (write it as stages[0].keep=0.5,0.25)")
        if key in grid:
            raise InputError(f"--grid names {key} twice (write all its values behind one)")
        if key == "name":
            raise InputError("--grid varies values, by which it names pipelines; `name` is none of them")
        split = _split(values)
        if twice := {one for one in split if split.count(one) > 1}:
            raise InputError(f"--grid {key} names {sorted(twice)[0] or 'nothing'} twice")
        if "" in split:
            raise InputError(f"--grid '{text}' has an empty value (write null for none)")
        grid[key] = tuple(split)
    count = 1
    for listed in grid.values():
        count *= len(listed)
    if count > MOST:
        raise InputError(f"--grid makes {count} pipelines of each; at most {MOST} (name fewer values)")
    return grid


def drawn(pipeline: Pipeline) -> dict[int, int]:
    """The seed of each stage that has one, by its number."""
    stages = yaml.safe_load(pipeline.resolved)["stages"]
    return {number: stage[SEED] for number, stage in enumerate(stages) if isinstance(stage.get(SEED), int)}


def _seeded(source: Source, overrides: Sequence[str], variation: Variation) -> list[Variant]:
    first = _named(source, overrides, variation.budget)
    own = drawn(first.pipeline)
    more = []
    for number in range(1, variation.seeds if own else 1):
        changed = [f"stages[{stage}].{SEED}={seed + number}" for stage, seed in own.items()]
        last = "-".join(dict.fromkeys(str(seed + number) for seed in own.values()))
        every = renamed([*overrides, *changed], f"{first.pipeline.name}-s{last}")
        more.append(_variant(source, every, variation.budget))
    return [first, *more]


def _named(source: Source, overrides: Sequence[str], budget: Sequence[str]) -> Variant:
    """The pipeline under these overrides. Its name says what they changed, if they did."""
    built = _variant(source, overrides, budget)
    told = suffix(overrides)
    own = [one for one in overrides if _pair(one)[0] == "name"]
    if not told or (not own and _unvaried(source, budget) == built.pipeline.sha):
        return built
    return _variant(source, renamed(overrides, built.pipeline.name + told), budget)


def _variant(source: Source, overrides: Sequence[str], budget: Sequence[str]) -> Variant:
    return Variant(prunekit.load(source, [*overrides, *budget]), tuple(overrides))


def _unvaried(source: Source, budget: Sequence[str]) -> str:
    """The hash of the pipeline as its file has it; empty where the file alone is none, as with a `???` in it."""
    try:
        return prunekit.load(source, budget).sha
    except SpecError:
        return ""


def _pair(text: str) -> tuple[str, str]:
    key, _, value = text.partition("=")
    return key.strip(), value.strip()


def _split(text: str) -> list[str]:
    """At its commas, but not inside brackets or quotes."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        else:
            depth += (character in "[{") - (character in "]}")
        if character == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]
