"""What computes cells: one model at a time, on one device. Nothing heavy is imported before it begins.

The same class is a process of this machine and an actor of Ray.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from prunekit_evals.sweep.orders import Job, Order, plan_of
from prunekit_evals.sweep.queue import Given

if TYPE_CHECKING:
    from prunekit_evals.runner import Runner


@dataclass(frozen=True)
class Setup:
    """What every worker is told at its beginning. threads: of each, for the CPU; None: torch chooses."""

    orders: tuple[Order, ...]
    threads: int | None = None
    download: bool = False


@dataclass(frozen=True)
class Report:
    """What became of a job. path: the file of its cell; empty where there is none. computed: by this worker, just now.

    held: another process computes it. error: why a cell failed, the whole of one line.
    """

    job: Job
    status: Literal["done", "failed", "held"]
    path: str = ""
    error: str = ""
    computed: bool = False


class Worker:
    """Computes cells of the orders on one device, with one model in memory."""

    def __init__(self, setup: Setup, device: str | None) -> None:
        """device: of the model, None: the loader chooses. Sets up this process: threads, and what libraries print."""
        threads = setup.threads
        if threads:
            for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
                os.environ[name] = str(threads)
        from prunekit_evals.lmms import quiet

        quiet.before_imports(setup.download)
        import torch

        if threads:
            torch.set_num_threads(threads)
        quiet.libraries()
        self.setup, self.device = setup, device
        self._current: tuple[int, Runner] | None = None

    def ready(self) -> bool:
        """It has begun."""
        return True

    def compute(self, given: Given) -> Report:
        """One cell, computed if it is not there. Never raises but for what ends the process."""
        from prunekit_evals.run import results, unanswered

        from prunekit.errors import PrunekitError

        job = given.job
        try:
            runner = self._runner(job.order)
            named, pipeline = runner.plan.tasks[job.task], runner.plan.pipelines[job.pipeline]
            if given.lost is None:
                cell = runner.cell(named, pipeline)
            else:
                cell = runner.failed(named, pipeline, PrunekitError(given.lost))
        except Exception as error:
            return Report(job, "failed", error=unanswered.reason(error))
        if cell is None:
            return Report(job, "held")
        path = str(results.path_of(runner.plan.out, cell))
        return Report(job, cell.status, path, cell.error, (named.name, pipeline.sha) in runner.computed)

    def _runner(self, number: int) -> Runner:
        """Of one order; the model of another one goes."""
        from prunekit_evals.runner import Runner, Silent

        if self._current is None or self._current[0] != number:
            self._current = None
            self._current = number, Runner(plan_of(self.setup.orders[number], self.device), Silent())
        return self._current[1]


def devices(count: int | None, cells: int) -> Sequence[str | None]:
    """The device of each worker of this machine. count: how many are wanted; None: one for each GPU, or each core.

    More workers than GPUs share them in turn.
    """
    import torch

    gpus = torch.cuda.device_count()
    wanted = min(count or gpus or min(cores(), 4), max(cells, 1))
    return [f"cuda:{number % gpus}" if gpus else "cpu" for number in range(wanted)]


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
