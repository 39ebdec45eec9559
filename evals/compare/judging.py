"""A table's figures: accuracies, differences to dense and to `random` at equal cost, and which of them hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from prunekit_evals.compare import clustered, verdicts
from prunekit_evals.compare.clustered import Column, Drawn, Seed
from prunekit_evals.compare.stats import Estimate

NEAR = 0.01  # budgets this close, in dense's FLOPs, are the same
NAMED = 8  # names in a sentence; more are counted, for their rows are marked

Scores = Mapping[int, float]
Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Contender:
    """One row. scores: task -> question -> score for each seed; a row has equally many seeds on all its tasks.

    random: whether it is the baseline that prunes at random. flops: fraction of dense's; None where not known.
    """

    name: str
    dense: bool
    random: bool
    flops: float | None
    scores: Mapping[str, tuple[Scores, ...]]


@dataclass(frozen=True)
class Comparison:
    """A row against `other`, paired, over the tasks that all rows have.

    wins, losses: images of which it got more, and less. p: McNemar's, exact; with several seeds, all three are of the
    two seeds with the largest p. corrected: after Holm's correction over all comparisons of the table.
    """

    other: str
    difference: Estimate
    wins: int
    losses: int
    p: float
    corrected: float = 1.0

    @property
    def holds(self) -> int:
        """1 when the row beats the other, -1 when the other beats it, 0 when neither is shown.

        The corrected test and the interval must agree.
        """
        if self.corrected > verdicts.ALPHA:
            return 0
        if self.wins > self.losses and self.difference.low > 0:
            return 1
        return -1 if self.wins < self.losses and self.difference.high < 0 else 0


@dataclass(frozen=True)
class Judged:
    """The figures of one row. seeds: its average under each seed, where it has several.

    hard: accuracy on the questions that downsampling gets wrong, all tasks together; None where there are none.
    """

    tasks: dict[str, Estimate]
    average: Estimate | None
    to_dense: Comparison | None
    to_random: Comparison | None
    seeds: tuple[float, ...] = ()
    hard: Estimate | None = None


def judge(
    rows: Sequence[Contender],
    shared: Sequence[str],
    images: Mapping[str, Mapping[int, str]],
    hard: Mapping[str, frozenset[int]] | None = None,
) -> tuple[dict[str, Judged], tuple[str, ...]]:
    """The figures of each row by name, and the pruned rows that could each be the best.

    shared: tasks for averages and differences. images: task -> question -> image, of all questions with a score.
    hard: task -> questions that downsampling gets wrong; None: they are not known.
    """
    book = _Book(images, [row.scores for row in rows])
    for row in rows:
        for task in row.scores:
            book.add(("task", row.name, task), book.mean(row, [task]))
        if shared:
            book.add(("average", row.name), book.mean(row, shared))
        if mix := book.of_hard(row, hard or {}):
            book.add(("hard", row.name), mix)
    pairs = [(kind, row, other) for row in rows if shared for kind, other in _others(row, rows)]
    pairs = [pair for pair in pairs if book.pair(*pair, shared)]
    drawn = book.drawn()
    tests = [book.test(row, other, shared) for _, row, other in pairs]
    fixed = verdicts.holm([p for _, _, p in tests])
    compared = {
        (kind, row.name): Comparison(other.name, book.estimate(drawn, (kind, row.name)), *test, corrected)
        for (kind, row, other), test, corrected in zip(pairs, tests, fixed, strict=True)
    }
    found = {row.name: _judged(row, shared, book, drawn, compared) for row in rows}
    return found, _best([row.name for row in rows if shared and not row.dense], book, drawn)


def against(
    row: Contender, others: Sequence[Contender], shared: Sequence[str], images: Mapping[str, Mapping[int, str]]
) -> tuple[Comparison, ...]:
    """One row against each of the others that it shares questions of all tasks with; corrected over these comparisons.

    shared, images: as of `judge`.
    """
    book = _Book(images, [one.scores for one in (row, *others)])
    met = [one for one in others if book.pair(one.name, row, one, shared)]
    drawn = book.drawn()
    tests = [book.test(row, one, shared) for one in met]
    return tuple(
        Comparison(one.name, book.estimate(drawn, (one.name, row.name)), *test, corrected)
        for one, test, corrected in zip(met, tests, verdicts.holm([p for _, _, p in tests]), strict=True)
    )


def sentences(rows: Mapping[str, Judged], best: Sequence[str]) -> tuple[str, ...]:
    """What holds, in words; nothing for a table without comparisons."""
    compared = [(name, one) for name, row in rows.items() for one in (row.to_dense, row.to_random) if one]
    if not compared:
        return ()
    count = len(compared)
    over = f"after Holm's correction over {count} comparisons" if count > 1 else "in the one comparison"
    won: dict[tuple[str, str], list[str]] = {}
    for name, one in compared:
        if one.holds > 0:
            won.setdefault(("beat", one.other), []).append(name)
        elif one.holds < 0:
            won.setdefault(("beaten", one.other), []).append(name)
    said = [
        f"{_listed(names)} {'beats' if len(names) == 1 else 'beat'} {other}" if way == "beat"
        else f"{other} beats {_listed(names)}"
        for (way, other), names in won.items()
    ]  # fmt: skip
    lines = [f"{'; '.join(said) or 'no row beats another'} (5 %, {over})"]
    if len(best) > 1:
        lines.append(f"these pruned rows could each be the best (95 % model confidence set): {', '.join(best)}")
    elif best and sum(row.to_dense is not None for row in rows.values()) > 1:
        lines.append(f"only {best[0]} can be the best pruned row (95 % model confidence set)")
    return tuple(lines)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= NAMED else f"{len(names)} rows (marked *)"


def _others(row: Contender, rows: Sequence[Contender]) -> Iterable[tuple[str, Contender]]:
    """What a row is compared to: the first dense row, and the random one whose cost is nearest, within `NEAR`."""
    dense = next((one for one in rows if one.dense), None)
    if dense is not None and not row.dense:
        yield "dense", dense
    if row.flops is None or row.dense or row.random:
        return
    near = [(abs(one.flops - row.flops), one.name, one) for one in rows if one.random and one.flops is not None]
    if near and (nearest := min(near, key=lambda one: one[:2]))[0] <= NEAR:
        yield "random", nearest[2]


def _judged(
    row: Contender, shared: Sequence[str], book: _Book, drawn: Drawn, compared: Mapping[tuple[str, str], Comparison]
) -> Judged:
    return Judged(
        {task: book.estimate(drawn, ("task", row.name, task)) for task in row.scores},
        book.estimate(drawn, ("average", row.name)) if shared else None,
        compared.get(("dense", row.name)),
        compared.get(("random", row.name)),
        book.of_seeds(row, shared) if shared else (),
        book.estimate(drawn, ("hard", row.name)) if ("hard", row.name) in book.figures else None,
    )


def _best(names: Sequence[str], book: _Book, drawn: Drawn) -> tuple[str, ...]:
    if not names:
        return ()
    at = [book.figures[("average", name)] for name in names]
    kept = verdicts.confidence_set([drawn.estimates[place].value for place in at], drawn.draws[at])
    return tuple(names[place] for place in kept)


class _Book:
    """Collects columns and figures, so that all of a table's figures come from the same draws."""

    def __init__(
        self, images: Mapping[str, Mapping[int, str]], scores: Iterable[Mapping[str, tuple[Scores, ...]]]
    ) -> None:
        asked: dict[str, set[int]] = {}
        for row in scores:
            for task, seeds in row.items():
                asked.setdefault(task, set()).update(*seeds)
        self.image: dict[str, dict[int, int]] = {}  # task -> question -> number of its image
        for task, numbers in asked.items():
            names = {number: images[task][number] for number in sorted(numbers)}
            places = {name: place for place, name in enumerate(dict.fromkeys(names.values()))}
            self.image[task] = {number: places[name] for number, name in names.items()}
        self.columns: list[Column] = []
        self.known: dict[tuple[str, str, int, frozenset[int]], int] = {}
        self.mixes: list[dict[int, float]] = []
        self.figures: dict[tuple[str, ...], int] = {}

    def add(self, name: tuple[str, ...], mix: dict[int, float]) -> None:
        self.figures[name] = len(self.mixes)
        self.mixes.append(mix)

    def mean(
        self, row: Contender, tasks: Sequence[str], among: Mapping[str, frozenset[int]] | None = None
    ) -> dict[int, float]:
        """Column -> weight of the unweighted mean over tasks and seeds. among: only these questions."""
        mix: dict[int, float] = {}
        for task in tasks:
            seeds = row.scores[task]
            for level, scores in enumerate(seeds):
                numbers = frozenset(scores) if among is None else among[task]
                mix[self._column(row, task, level, numbers)] = 1 / (len(tasks) * len(seeds))
        return mix

    def of_hard(self, row: Contender, hard: Mapping[str, frozenset[int]]) -> dict[int, float]:
        """Column -> weight of the mean over these questions; empty where the row has none of them.

        They stand for one task, of which each question counts once: a task of its own may have a single one.
        """
        asked = [(task, number) for task in hard for number in sorted(hard[task])]
        images = {name: place for place, name in enumerate(dict.fromkeys((t, self.image[t][n]) for t, n in asked))}
        places = [images[task, self.image[task][number]] for task, number in asked]
        levels = min((len(row.scores[task]) for task in hard if task in row.scores), default=0)
        mix: dict[int, float] = {}
        for level in range(levels):
            scores = [row.scores[task][level].get(number) if task in row.scores else None for task, number in asked]
            sums = np.bincount(places, [score or 0.0 for score in scores], len(images))
            counts = np.bincount(places, [float(score is not None) for score in scores], len(images))
            if counts.any():
                mix[len(self.columns)] = 1 / levels
                seed = Seed(row.name, level, levels) if levels > 1 else None
                self.columns.append(Column("hard", sums, counts, seed))
        return mix

    def pair(self, kind: str, row: Contender, other: Contender, shared: Sequence[str]) -> bool:
        """Add the figure of a difference on the questions that both answered; False when there are none on a task."""
        among = {task: both(row, other, task) for task in shared}
        if not all(among.values()):
            return False
        mix = self.mean(row, shared, among)
        for column, weight in self.mean(other, shared, among).items():
            mix[column] = mix.get(column, 0.0) - weight
        self.add((kind, row.name), mix)
        return True

    def test(self, row: Contender, other: Contender, shared: Sequence[str]) -> tuple[int, int, float]:
        """Images won and lost on all tasks together, and their p: of the two seeds that speak least for a difference.

        A mean over seeds is often above or below a single score where neither is better, so seeds are not averaged.
        """
        among = {task: both(row, other, task) for task in shared}
        ours, theirs = self._sums(row, among), self._sums(other, among)
        counted = [verdicts.discordant(one - another) for one in ours for another in theirs]
        wins, losses = max(counted, key=lambda images: verdicts.mcnemar(*images))
        ahead = {won > lost for won, lost in counted if won != lost}
        return wins, losses, verdicts.mcnemar(wins, losses) if len(ahead) < 2 else 1.0  # 1: seeds contradict each other

    def _sums(self, row: Contender, among: Mapping[str, frozenset[int]]) -> list[Array]:
        """For each seed the sums of scores of all tasks' images."""
        at = [
            [self._column(row, task, level, among[task]) for task in among]
            for level in range(min(len(row.scores[task]) for task in among))
        ]
        return [np.concatenate([self.columns[place].sums for place in places]) for places in at]

    def drawn(self) -> Drawn:
        mixes = np.zeros((len(self.mixes), len(self.columns)))
        for place, mix in enumerate(self.mixes):
            mixes[place, list(mix)] = list(mix.values())
        return clustered.estimate(self.columns, mixes) if self.mixes else Drawn((), np.empty((0, 0)))

    def estimate(self, drawn: Drawn, name: tuple[str, ...]) -> Estimate:
        return drawn.estimates[self.figures[name]]

    def of_seeds(self, row: Contender, shared: Sequence[str]) -> tuple[float, ...]:
        """The average under each seed; empty with one."""
        by_task = [[sum(scores.values()) / len(scores) for scores in row.scores[task]] for task in shared]
        means = [sum(of_seed) / len(of_seed) for of_seed in zip(*by_task, strict=True)]
        return tuple(means) if len(means) > 1 else ()

    def _column(self, row: Contender, task: str, level: int, numbers: frozenset[int]) -> int:
        key = (row.name, task, level, numbers)
        if key not in self.known:
            scores, levels = row.scores[task][level], len(row.scores[task])
            asked = sorted(numbers)
            places = [self.image[task][number] for number in asked]
            images = max(self.image[task].values()) + 1
            sums = np.bincount(places, [scores[number] for number in asked], images)
            counts = np.bincount(places, minlength=images).astype(np.float64)
            seed = Seed(row.name, level, levels) if levels > 1 else None
            self.known[key] = len(self.columns)
            self.columns.append(Column(task, sums, counts, seed))
        return self.known[key]


def both(row: Contender, other: Contender, task: str) -> frozenset[int]:
    """The questions of a task that two rows have answered under all their seeds."""
    return frozenset.intersection(*(frozenset(scores) for one in (row, other) for scores in one.scores[task]))
