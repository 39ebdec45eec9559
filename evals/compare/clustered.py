"""Intervals of 95 % that draw images anew, not questions, for all figures of a table at once.

BCa: https://doi.org/10.1080/01621459.1987.10478410 (Efron 1987), as `scipy.stats.bootstrap` computes it. Questions
about one image are no independent draws (https://doi.org/10.1111/j.1467-9868.2007.00593.x), so an image is drawn with
all its questions; then a mean needs no more than each image's sum of scores and its number of questions. Every figure
is computed on the same draws, so a difference of two rows is paired. Seeds are a second factor, drawn beside images.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from prunekit_evals.compare.stats import Estimate
from scipy import sparse, stats

RESAMPLES = 9_999
LEVEL = 0.95
BATCH = 4_000_000  # drawn images held at a time

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Seed:
    """One of a row's seeds: `level` of `levels`. Columns of one `row` are drawn together."""

    row: str
    level: int
    levels: int


@dataclass(frozen=True, eq=False)
class Column:
    """The mean score of one pipeline on one task under one seed.

    sums, counts: shape (images,), float64: of the scores of an image's questions, and how many questions these are.
    Columns of one task have the same images in the same order. seed: None where there is but one.
    """

    task: str
    sums: Array
    counts: Array
    seed: Seed | None = None


@dataclass(frozen=True, eq=False)
class Drawn:
    """Estimates of figures, and `draws` (figures, resamples) of them, all from the same resamples."""

    estimates: tuple[Estimate, ...]
    draws: Array


def estimate(columns: Sequence[Column], mixes: Array, resamples: int = RESAMPLES) -> Drawn:
    """Figures with their intervals. mixes: shape (figures, columns): each figure is a weighted sum of columns.

    Where resamples cannot vary (every image has the same score), the interval is what an exact binomial test leaves
    open: if more than a share u of images were otherwise, one would have been seen. One image leaves everything open.
    Raises ValueError for a column without questions.
    """
    if any(not column.counts.sum() for column in columns):
        raise ValueError("a column without questions")
    layout, weights = _Layout(columns), sparse.csr_array(mixes)  # of many rows' columns a figure has few
    value = weights @ layout.means
    if layout.data:
        with warnings.catch_warnings(), np.errstate(invalid="ignore", divide="ignore"):
            warnings.simplefilter("ignore")  # a figure that does not vary: told by its NaN, and handled below
            found = stats.bootstrap(
                layout.data, lambda *drawn, axis: layout.figures(drawn, weights), n_resamples=resamples, method="BCa",
                vectorized=True, batch=max(1, BATCH // layout.size), confidence_level=LEVEL, rng=0,
            )  # fmt: skip
        low, high, draws = *found.confidence_interval, found.bootstrap_distribution
    else:
        low, high, draws = np.full_like(value, np.nan), np.full_like(value, np.nan), np.tile(value[:, None], resamples)
    estimates = [_bounded(*row) for row in zip(value, low, high, draws, mixes, _images(layout, mixes), strict=True)]
    questions = _questions(columns, mixes)
    return Drawn(tuple(Estimate(*one, n) for one, n in zip(estimates, questions, strict=True)), draws)


class _Layout:
    """What is drawn (images of each task, seeds of each row) and how columns follow from it."""

    def __init__(self, columns: Sequence[Column]) -> None:
        self.columns = columns
        self.tasks = {column.task: len(column.sums) for column in columns}
        self.seeds = {column.seed.row: column.seed.levels for column in columns if column.seed}
        self.drawn_tasks = [task for task, images in self.tasks.items() if images > 1]
        sizes = [*(self.tasks[task] for task in self.drawn_tasks), *self.seeds.values()]
        self.data = [np.arange(size) for size in sizes]
        self.size = sum(sizes)
        self.means = np.array([column.sums.sum() / column.counts.sum() for column in columns])
        self.places = {task: [i for i, one in enumerate(columns) if one.task == task] for task in self.drawn_tasks}
        self.sums = {task: np.stack([columns[i].sums for i in at], 1) for task, at in self.places.items()}
        self.counts = {task: np.stack([columns[i].counts for i in at], 1) for task, at in self.places.items()}

    def figures(self, drawn: Sequence[Any], mixes: sparse.csr_array) -> Array:
        """drawn: for each of `data` numbers drawn from it, shape (..., size). Returns (figures, ...)."""
        times = [_times(numbers, len(of)) for numbers, of in zip(drawn, self.data, strict=True)]
        means = np.empty((*drawn[0].shape[:-1], len(self.columns)))
        means[...] = self.means  # one image is not drawn; and a resample without a question of a column tells nothing
        for task, weights in zip(self.drawn_tasks, times, strict=False):
            at = self.places[task]
            counts = weights @ self.counts[task]
            means[..., at] = np.where(counts > 0, weights @ self.sums[task] / counts, self.means[at])
        of_rows = dict(zip(self.seeds, times[len(self.drawn_tasks) :], strict=True))
        for place, column in enumerate(self.columns):
            if column.seed is not None:
                weights = of_rows[column.seed.row]
                means[..., place] *= weights[..., column.seed.level] / weights.sum(-1) * column.seed.levels
        figures = mixes @ means.reshape(-1, len(self.columns)).T
        return figures.reshape(-1, *means.shape[:-1])


def _times(numbers: Any, size: int) -> Array:
    """How often each of `size` was drawn. numbers: (..., draws). Returns (..., size)."""
    flat = numbers.reshape(-1, numbers.shape[-1]).astype(np.intp)
    if len(flat) > 1 and numbers.ndim == 2 and numbers.strides[0] == 0:  # one draw, repeated for the others' sake
        return np.broadcast_to(_times(flat[:1], size), (len(flat), size))
    places = flat + size * np.arange(len(flat))[:, None]
    counted = np.bincount(places.ravel(), minlength=size * len(flat))
    return counted.reshape(*numbers.shape[:-1], size).astype(np.float64)


def _bounded(value: float, low: float, high: float, draws: Array, mix: Array, images: int) -> tuple[float, ...]:
    """The interval within what the figure can be, with `value` in it."""
    least, most = float(mix[mix < 0].sum()), float(mix[mix > 0].sum())
    if images < 2:
        low, high = least, most
    elif not (np.isfinite(low) and np.isfinite(high)) or np.ptp(draws) < 1e-12:
        share = stats.binomtest(0, images).proportion_ci(LEVEL, "exact").high
        low, high = value - share * (value - least), value + share * (most - value)
    return float(value), float(max(least, min(low, value))), float(min(most, max(high, value)))


def _used(columns: Sequence[Column], mix: Array) -> list[Column]:
    return [columns[place] for place in np.flatnonzero(mix)]


def _images(layout: _Layout, mixes: Array) -> list[int]:
    """For each figure the images of its smallest task: with one, the figure is open whatever the others say."""
    used = ([layout.tasks[column.task] for column in _used(layout.columns, mix)] for mix in mixes)
    return [min(sizes, default=1) for sizes in used]


def _questions(columns: Sequence[Column], mixes: Array) -> list[int]:
    """For each figure its questions, those of several rows or seeds once."""
    counted = ({column.task: int(column.counts.sum()) for column in _used(columns, mix)} for mix in mixes)
    return [sum(tasks.values()) for tasks in counted]
