"""Intervals in closed form, for studies and cards that recorded right and wrong alone; `clustered` has those of tables.

Scores are in [0, 1]. All intervals are of 95 %.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

Z = 1.959964


@dataclass(frozen=True)
class Estimate:
    """A value with its interval; `n` is the number of questions behind it."""

    value: float
    low: float
    high: float
    n: int

    @property
    def half(self) -> float:
        """Half the width of the interval."""
        return (self.high - self.low) / 2


def wilson(scores: Iterable[float]) -> Estimate:
    """Mean score with Wilson's interval. Fractional scores vary less than 0/1 scores of that mean: it is then wide.

    Raises ValueError without scores.
    """
    values = list(scores)
    n = len(values)
    if not n:
        raise ValueError("no scores")
    mean = math.fsum(values) / n
    centre = (mean + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(max(mean * (1 - mean), 0.0) / n + Z * Z / (4 * n * n))
    return Estimate(mean, max(0.0, centre - half), min(1.0, centre + half), n)


def paired(
    ours: Mapping[int, float], dense: Mapping[int, float], groups: Mapping[int, str] | None = None
) -> Estimate | None:
    """Mean of ours minus dense over the questions that both answered; None when there is no such question.

    ours, dense: question number -> score. groups: questions of one group (two about one image) count as one draw.
    The interval is normal, with half a made-up win and half a made-up loss in the variance and two made-up draws in
    the count (Agresti and Min 2005), so that two pipelines that never differ in 50 questions are not called equal.
    """
    shared = sorted(ours.keys() & dense.keys())
    if not shared:
        return None
    sums: dict[str, float] = {}
    for number in shared:
        group = groups.get(number, f"#{number}") if groups else f"#{number}"
        sums[group] = sums.get(group, 0.0) + ours[number] - dense[number]
    n, draws = len(shared), len(sums)
    per_draw = n / draws
    total = math.fsum(sums.values())
    spread = math.fsum(value * value for value in sums.values()) + per_draw**2
    variance = max(spread - total * total / (draws + 2), 0.0)
    error = Z * math.sqrt(variance) / (n + 2 * per_draw)
    centre = total / (n + 2 * per_draw)
    return Estimate(total / n, min(centre - error, total / n), max(centre + error, total / n), n)


def average(estimates: Iterable[Estimate]) -> Estimate | None:
    """The unweighted mean of independent estimates, such as one pipeline's tasks; None without any."""
    parts = list(estimates)
    if not parts:
        return None
    mean = math.fsum(part.value for part in parts) / len(parts)
    down = math.sqrt(math.fsum((part.value - part.low) ** 2 for part in parts)) / len(parts)
    up = math.sqrt(math.fsum((part.high - part.value) ** 2 for part in parts)) / len(parts)
    return Estimate(mean, mean - down, mean + up, sum(part.n for part in parts))
