"""What was measured of prunekit-smol, read back: for every row of a table and every question a bit, with intervals."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from prunekit_evals.compare.clustered import Column, estimate
from prunekit_evals.compare.stats import Estimate
from prunekit_evals.micro.questions import FAMILIES
from prunekit_evals.studies.smol.rows import KINDS

__all__ = ["Record", "load"]


@dataclass(frozen=True, eq=False)
class Record:
    """A file of `measure.py`.

    asked: bool `[families, scenes]`, whether a scene admits a question of the family. right: for every row bool of the
    same shape. notes: how sets of layers were chosen.
    """

    asked: np.ndarray
    right: dict[str, np.ndarray]
    notes: dict[str, Any]

    @property
    def calibration(self) -> int:
        """Scenes, the first, whose answers decided which layers a greedy set leaves out."""
        return int(self.notes["scenes of calibration"])

    def since(self, first: int) -> Record:
        """Without the scenes before number `first`."""
        return Record(self.asked[:, first:], {name: one[:, first:] for name, one in self.right.items()}, self.notes)

    def families(self, row: str) -> list[Estimate]:
        """The share of right answers of every family; of each the scenes that admit its question are drawn anew."""
        columns = [
            Column(str(place), right[asked].astype(float), np.ones(int(asked.sum())))
            for place, (right, asked) in enumerate(zip(self.right[row], self.asked, strict=True))
        ]
        return list(estimate(columns, np.eye(len(columns))).estimates)

    def means(self, rows: Sequence[str]) -> list[Estimate]:
        """Of each row the mean over families, each family with one weight."""
        return self._estimates(rows, np.kron(np.eye(len(rows)), self._even()))

    def differences(self, pairs: Sequence[tuple[str, str]]) -> list[Estimate]:
        """Of each pair of rows the mean of the first minus that of the second, on the same questions."""
        rows = list(dict.fromkeys(name for pair in pairs for name in pair))
        mixes = np.zeros((len(pairs), len(rows)))
        for place, (ours, theirs) in enumerate(pairs):
            mixes[place, rows.index(ours)] += 1
            mixes[place, rows.index(theirs)] -= 1
        return self._estimates(rows, np.kron(mixes, self._even()))

    def _even(self) -> np.ndarray:
        count = len(self.asked)
        return np.full((1, count), 1 / count)

    def _estimates(self, rows: Sequence[str], mixes: np.ndarray) -> list[Estimate]:
        """Scenes are drawn anew, each with all its questions."""
        asked = self.asked.astype(float)
        columns = [
            Column("scenes", right * of, of) for row in rows for right, of in zip(self.right[row], asked, strict=True)
        ]
        return list(estimate(columns, mixes).estimates)


def load(file: Path) -> Record:
    """What a file of `measure.py` holds. Raises ValueError where it was not asked a question of every family."""
    data = json.loads(file.read_text())
    scenes, count = data["shape"]
    kinds = np.frombuffer(base64.b64decode(data["kinds"]), np.int8).reshape(scenes, count)
    numbers = [KINDS.index(family) for family in FAMILIES]
    asked = np.stack([(kinds == number).any(1) for number in numbers])
    if not asked.any(1).all():
        raise ValueError(f"'{file}' has no question of some family")
    right = {}
    for name, row in data["rows"].items():
        bits = np.unpackbits(np.frombuffer(base64.b64decode(row["right"]), np.uint8), count=scenes * count)
        answered = bits.reshape(scenes, count).astype(bool)
        right[name] = np.stack([(answered & (kinds == number)).any(1) for number in numbers])
    return Record(asked, right, data["notes"])
