"""Hands cells to workers until every one is there. Results are files: what a worker says only tells how far it is."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from prunekit_evals.sweep.orders import Job
from prunekit_evals.sweep.queue import Given, Place, Queue
from prunekit_evals.sweep.worker import Report

from prunekit.errors import PrunekitError

LOOK = 0.5  # seconds between two looks at cells that other processes compute
PATIENCE = 300.0  # seconds in which a worker has to start, while there is none


@dataclass(frozen=True)
class Started:
    """A worker can be handed jobs now."""

    worker: int


@dataclass(frozen=True)
class Finished:
    """A worker is done with its job."""

    worker: int
    report: Report


@dataclass(frozen=True)
class Died:
    """A worker is no more. reason: as far as it is known."""

    worker: int
    reason: str


Event = Started | Finished | Died


class Pool(Protocol):
    """Workers by number."""

    @property
    def size(self) -> int:
        """How many."""

    def start(self, number: int) -> None:
        """Begin a worker; `Started` follows, or `Died`."""

    def submit(self, number: int, given: Given) -> None:
        """Hand it a job; `Finished` follows, or `Died`."""

    def wait(self, seconds: float) -> list[Event]:
        """What happened, as soon as something did, or after so many seconds."""


class Telling(Protocol):
    """Told how far a sweep is."""

    def ended(self, report: Report) -> None:
        """A cell is there, or has failed."""

    def say(self, text: str) -> None:
        """Something that whoever waits should know."""


class Driver:
    """Runs jobs on a pool.

    retries: how many workers may die at one cell before it is given up; a worker that dies more often without a result
    is not started again.
    """

    def __init__(self, jobs: Sequence[Job], pool: Pool, telling: Telling, retries: int) -> None:
        self.queue = Queue(list(jobs), retries)
        self.pool, self.telling, self.retries = pool, telling, retries
        self.reports: dict[Job, Report] = {}
        self._working: dict[int, Job] = {}
        self._held: list[tuple[float, Job]] = []  # when to look again at what other processes compute
        self._last = ""
        self._idle: set[int] = set()
        self._starting: set[int] = set()
        self._places: dict[int, Place] = {}
        self._fruitless = dict.fromkeys(range(pool.size), 0)

    def run(self) -> list[Report]:
        """Every job's report, in the order of the jobs. Raises PrunekitError where no worker is left to go on."""
        jobs = list(self.queue.waiting)
        for number in range(min(self.pool.size, len(jobs))):
            self._start(number)
        since = time.monotonic()
        while len(self.reports) < len(jobs):
            self._hand_out()
            events = self.pool.wait(LOOK)
            for event in events:
                self._take(event)
            if self._working or events:
                since = time.monotonic()
            self._check_alive(time.monotonic() - since)
        return [self.reports[job] for job in jobs]

    def _start(self, number: int) -> None:
        self._starting.add(number)
        self.pool.start(number)

    def _hand_out(self) -> None:
        for one in [held for held in self._held if held[0] <= time.monotonic()]:
            self._held.remove(one)
            self.queue.later(one[1])
        for number in sorted(self._idle):
            others = [place for one, place in self._places.items() if one != number]
            given = self.queue.take(self._places.get(number), others)
            if given is None:
                return
            self._idle.discard(number)
            self._working[number], self._places[number] = given.job, given.job.place
            self.pool.submit(number, given)

    def _take(self, event: Event) -> None:
        number = event.worker
        if isinstance(event, Died):
            self._died(number, event.reason)
            return
        self._starting.discard(number)
        self._idle.add(number)
        if isinstance(event, Finished):
            job = self._working.pop(number)
            if event.report.status == "held":
                self._held.append((time.monotonic() + LOOK, job))
                return
            self._fruitless[number] = 0
            self.reports[job] = event.report
            self.telling.ended(event.report)

    def _died(self, number: int, reason: str) -> None:
        for of in (self._idle, self._starting):
            of.discard(number)
        self._places.pop(number, None)
        job = self._working.pop(number, None)
        if job is not None:
            self.queue.died(job, reason)
        self._fruitless[number] += 1
        again = self._fruitless[number] <= self.retries + 1
        self.telling.say(f"worker {number} died ({reason})" + ("" if again else "; it is not started again"))
        self._last = reason
        if again:
            self._start(number)

    def _check_alive(self, idle: float) -> None:
        """Raise where nobody is left, or nobody starts."""
        if self._working or self._idle:
            return
        if not self._starting:
            raise PrunekitError(f"no worker is left: each died, the last: {self._last} (what is done is kept)")
        if idle > PATIENCE:
            raise PrunekitError(
                f"no worker could be started within {PATIENCE:.0f} s: nothing has room for one "
                "(fewer --workers, or look at `ray status`; what is done is kept)"
            )
