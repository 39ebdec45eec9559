"""Which differences hold: exact tests on discordant images, Holm's correction, and the rows that could be the best."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from scipy import stats

ALPHA = 0.05
EQUAL = 1e-9  # scores of an image closer than this are equal: means over seeds are rounded

Array = np.ndarray[Any, np.dtype[np.float64]]


def discordant(differences: Array) -> tuple[int, int]:
    """How many images the one and the other got more of. differences: of the images' sums of scores."""
    return int((differences > EQUAL).sum()), int((differences < -EQUAL).sum())


@cache
def mcnemar(wins: int, losses: int) -> float:
    """McNemar's exact p, two-sided: https://doi.org/10.1007/BF02295996, here of discordant images.

    With one question an image it is the test on discordant questions; with several, these are no independent pairs.
    """
    return float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def holm(values: Sequence[float]) -> list[float]:
    """p values after Holm's correction, in the order given: https://www.jstor.org/stable/4615733."""
    order = np.argsort(values, kind="stable")
    scaled = np.maximum.accumulate(np.asarray(values)[order] * np.arange(len(values), 0, -1))
    corrected = np.empty(len(values))
    corrected[order] = np.minimum(scaled, 1.0)
    return [float(value) for value in corrected]


def confidence_set(values: Sequence[float], draws: Array, alpha: float = ALPHA) -> list[int]:
    """The rows of which each could be the best: it is among them with probability 1 - alpha at least.

    values: of the rows, more is better. draws: shape (rows, resamples), of all rows on the same resamples. The model
    confidence set of https://doi.org/10.3982/ECTA5771 (Hansen, Lunde and Nason 2011) with its T_max: while equal rows
    would not be as unequal as these, the worst goes.
    """
    alive = list(range(len(values)))
    while len(alive) > 1:
        found, drawn = np.asarray(values)[alive], draws[alive]
        behind = found.mean() - found
        noise = drawn.mean(0) - drawn - behind[:, None]
        error = np.sqrt((noise**2).mean(1))
        # A difference that no resample changes is certain, unless there is none.
        certain = error < EQUAL
        scale = np.where(certain, 1.0, error)
        distance = np.where(certain, np.where(behind > EQUAL, np.inf, 0.0), behind / scale)
        under_equality = np.where(certain[:, None], 0.0, noise / scale[:, None]).max(0)
        if (under_equality >= distance.max()).mean() >= alpha:
            break
        alive.pop(int(distance.argmax()))
    return alive
