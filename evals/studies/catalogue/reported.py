"""What papers report of strategies: `reported.yaml`, checked as it is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from prunekit_evals.studies.catalogue.places import REPORTED


@dataclass(frozen=True)
class Line:
    """One row. kept: visual tokens that stay, or a share of them. scores: in the order of the table's benchmarks."""

    strategy: str
    called: str
    kept: int | str
    scores: tuple[float | None, ...]
    sources: tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """One table of papers' numbers. base: the unpruned model's scores."""

    title: str
    model: str
    remark: str
    benchmarks: tuple[str, ...]
    base: tuple[float, ...]
    lines: tuple[Line, ...]

    def mean(self, line: Line) -> float:
        """Mean % of the unpruned model, unweighted, over the benchmarks that the line has."""
        shares = [score / base for score, base in zip(line.scores, self.base, strict=True) if score is not None]
        return 100 * sum(shares) / len(shares)


@dataclass(frozen=True)
class Reported:
    """The file. sources: what the short names of sources stand for."""

    sources: Mapping[str, str]
    tables: tuple[Source, ...]

    def of(self, strategy: str) -> Sequence[tuple[Source, tuple[Line, ...]]]:
        """The tables that have the strategy, with its lines."""
        found = ((one, tuple(line for line in one.lines if line.strategy == strategy)) for one in self.tables)
        return [(one, lines) for one, lines in found if lines]


def load() -> Reported:
    """Read the file. Raises ValueError for a row that does not fit its table."""
    data: Mapping[str, Any] = yaml.safe_load(REPORTED.read_text(encoding="utf-8"))
    return Reported(data["sources"], tuple(_table(one, data["sources"]) for one in data["tables"]))


def _table(data: Mapping[str, Any], sources: Mapping[str, str]) -> Source:
    lines = []
    for strategy, called, kept, scores, told in data["rows"]:
        if len(scores) != len(data["benchmarks"]) or not set(told) <= set(sources):
            raise ValueError(f"{data['title']}: the row of {called} at {kept} does not fit")
        lines.append(Line(strategy, called, kept, tuple(scores), tuple(told)))
    benchmarks, base = tuple(data["benchmarks"]), tuple(data["base"])
    return Source(data["title"], data["model"], data["remark"], benchmarks, base, tuple(lines))
