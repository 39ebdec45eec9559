"""Which cell a free worker computes next, and what is to be done about those whose worker died. Nothing runs here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from prunekit_evals.sweep.orders import Job

Place = tuple[int, int]


@dataclass(frozen=True)
class Given:
    """What a worker is handed. lost: how the workers died that were at this cell before; None: compute it.

    With a reason it is not computed, but written as failed.
    """

    job: Job
    lost: str | None = None


@dataclass
class Queue:
    """Jobs that wait. retries: how many workers may die at one cell before it is given up.

    A worker stays at its model and task as long as there is something to do; then it goes where the fewest are.
    """

    waiting: list[Job]
    retries: int
    _deaths: Counter[Job] = field(default_factory=Counter)
    _reasons: dict[Job, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.waiting)

    def take(self, at: Place | None, others: Iterable[Place]) -> Given | None:
        """The next job for a worker that is prepared for the place `at`, None for nowhere; None when nothing waits.

        others: the places at which the other workers are.
        """
        if not self.waiting:
            return None
        busy = Counter(others)
        # The first of the waiting ones decides between places that are as good, so that orders keep their order.
        job = min(self.waiting, key=lambda one: (one.place != at, not at or one.order != at[0], busy[one.place]))
        self.waiting.remove(job)
        return Given(job, self._reasons[job] if self._deaths[job] > self.retries else None)

    def later(self, job: Job) -> None:
        """Another process computes it: look again when everything else is done."""
        self.waiting.append(job)

    def died(self, job: Job, reason: str) -> None:
        """Its worker has died: the next one takes it up, with what the journal has of it."""
        self._deaths[job] += 1
        count = self._deaths[job]
        self._reasons[job] = f"{count} {'worker' if count == 1 else 'workers'} died at it, the last: {reason}"
        self.waiting.insert(0, job)
