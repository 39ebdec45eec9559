"""Random splits of collected prompts: calibrated on one part, measured on the other."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunekit.pipeline import risk

SPLITS, CONFIDENCE = 20, 0.9
RISKS = (0.02, 0.05, 0.1, 0.2)


@dataclass(frozen=True, eq=False)
class Prompts:
    """P prompts on R rungs, the dense one first: harms, float (P, R); differs, bool (P, R); flops, float (P, R)."""

    harms: NDArray[np.float64]
    differs: NDArray[np.bool_]
    flops: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.harms)

    def part(self, which: NDArray[np.int64]) -> Prompts:
        """Some of them."""
        return Prompts(self.harms[which], self.differs[which], self.flops[which])

    @property
    def critical(self) -> NDArray[np.float64]:
        """Of each prompt the harm of the first rung on which its answer differs; infinity for none: float (P,)."""
        first = self.harms[np.arange(len(self)), self.differs.argmax(1)]
        return np.where(self.differs.any(1), first, np.inf)

    def at(self, rungs: NDArray[np.int64]) -> tuple[float, float]:
        """The share of answers that differ, and mean FLOPs, where each prompt takes its rung, int64 (P,)."""
        rows = np.arange(len(self))
        return float(self.differs[rows, rungs].mean()), float(self.flops[rows, rungs].mean())

    def below(self, threshold: float) -> NDArray[np.int64]:
        """The rung that each takes: int64 (P,)."""
        rungs: NDArray[np.int64] = (self.harms[:, 1:] < threshold).sum(1)
        return rungs


@dataclass(frozen=True)
class Split:
    """One calibration. differ, flops: held out, under the budget of risk. fixed: the cheapest rung that is certified by
    the same bound for all prompts alike, and held out its share and FLOPs. equal: FLOPs of fixed budgets, two of them
    mixed, that agree as often on the held-out prompts. foreign: the share on prompts from elsewhere; None: none.
    """

    differ: float
    flops: float
    rungs: tuple[float, ...]
    fixed_differ: float
    fixed_flops: float
    equal_flops: float
    foreign: float | None


def read(path: Path) -> tuple[dict[str, Any], dict[str, Prompts]]:
    """A collected file: what it is of, and its prompts by the name of their source."""
    data = json.loads(path.read_text(encoding="utf-8"))
    rows, sets = data.pop("rows"), {}
    for name in dict.fromkeys(row["set"] for row in rows):
        mine = [row for row in rows if row["set"] == name]
        columns = {key: np.array([row[key] for row in mine]) for key in ("harms", "differs", "flops")}
        sets[name] = Prompts(columns["harms"], columns["differs"].astype(bool), columns["flops"])
    return data, sets


def replay(prompts: Prompts, share: float, foreign: Prompts | None, splits: int = SPLITS) -> list[Split]:
    """Calibrate on a random half, measure on the other, so many times."""
    made = []
    for seed in range(splits):
        drawn = np.random.default_rng(seed).permutation(len(prompts))
        half = len(prompts) // 2
        made.append(_split(prompts.part(drawn[:half]), prompts.part(drawn[half:]), share, foreign))
    return made


def _split(calibration: Prompts, held_out: Prompts, share: float, foreign: Prompts | None) -> Split:
    threshold = risk.threshold(np.sort(calibration.critical).tolist(), share, CONFIDENCE)
    rungs = held_out.below(threshold)
    differ, flops = held_out.at(rungs)
    ever = np.logical_or.accumulate(calibration.differs, 1).sum(0)
    allowed = risk.allowed(len(calibration), share, CONFIDENCE)
    certified = int((ever < allowed).sum()) - 1 if allowed else 0
    fixed = held_out.at(np.full(len(held_out), max(certified, 0)))
    equal = _equal(held_out, differ)
    elsewhere = None if foreign is None else foreign.at(foreign.below(threshold))[0]
    taken = np.bincount(rungs, minlength=held_out.harms.shape[1]) / len(held_out)
    return Split(differ, flops, tuple(taken.tolist()), *fixed, equal, elsewhere)


def _equal(prompts: Prompts, differ: float) -> float:
    """The least mean FLOPs at which fixed budgets agree as often; between two rungs, prompts take one by chance."""
    shares, costs = prompts.differs.mean(0), prompts.flops.mean(0)
    best = np.inf
    for low in range(len(shares)):
        for high in range(len(shares)):
            if shares[low] <= differ <= shares[high]:
                span = shares[high] - shares[low]
                weight = 0.0 if span == 0 else (differ - shares[low]) / span
                best = min(best, costs[low] + weight * (costs[high] - costs[low]), costs[low])
    return float(min(best, costs[shares <= differ].min()))
