"""What one stage did to each visual token of a sample, and in which rank it scored them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cached_property

from prunekit.records import StageEvent, StageTrace


class Fate(Enum):
    """What became of a visual token at a stage."""

    KEPT = "kept"
    MERGED = "merged"  # into kept tokens
    DROPPED = "dropped"
    GONE = "gone before"


@dataclass(frozen=True)
class Scores:
    """The scores of one stage. ranks: of each token from 0, the lowest, to 1; equal scores have one rank."""

    low: float
    middle: float
    high: float
    ranks: Mapping[int, float]

    @classmethod
    def of(cls, scores: Mapping[int, float]) -> Scores:
        """From at least one score."""
        ordered = sorted(set(scores.values()))
        last = max(len(ordered) - 1, 1)
        ranks = {score: number / last for number, score in enumerate(ordered)}
        listed = sorted(scores.values())
        middle = listed[len(listed) // 2]
        return cls(listed[0], middle, listed[-1], {token: ranks[score] for token, score in scores.items()})


@dataclass(frozen=True)
class StageMap:
    """One decision of a stage for one sample. original: visual tokens of the sample."""

    event: StageEvent
    trace: StageTrace
    original: int
    sample: int

    @property
    def title(self) -> str:
        """`fastv at 2`."""
        site = self.event.site
        return f"{self.event.stage} at {'layer ' * site[:1].isdigit()}{site}"

    @property
    def caption(self) -> str:
        """How many tokens it kept, merged and dropped."""
        trace = self.trace
        parts = [f"{len(trace.kept)} of {len(trace.entered)} kept"]
        parts += [f"{len(trace.merged)} merged"] * bool(trace.merged)
        parts += [f"{len(trace.dropped)} dropped"] * bool(trace.dropped)
        asked = None if self.event.asked is None else self.event.asked[self.sample]
        parts += [f"asked for {asked}"] * (asked not in (None, len(trace.kept)))
        resized = self.event.resized
        parts += [f"shown at {width} × {height}" for height, width in ([] if resized is None else resized[self.sample])]
        return ", ".join(parts)

    @cached_property
    def fates(self) -> dict[int, Fate]:
        """Of every original visual token."""
        trace = self.trace
        fates = dict.fromkeys(range(self.original), Fate.GONE)
        fates |= dict.fromkeys(trace.dropped, Fate.DROPPED) | dict.fromkeys(trace.kept, Fate.KEPT)
        return fates | dict.fromkeys(trace.merged, Fate.MERGED)

    @cached_property
    def anchors(self) -> frozenset[int]:
        """Kept tokens that others were merged into."""
        return frozenset(token for into in self.trace.merged.values() for token in into)

    @cached_property
    def scores(self) -> Scores | None:
        """None: the strategy does not score."""
        return Scores.of(self.trace.scores) if self.trace.scores else None
