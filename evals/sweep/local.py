"""Workers that are processes of this machine, each behind a pipe of its own: a killed one takes nothing with it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from prunekit_evals.sweep.driver import Died, Event, Finished, Started
from prunekit_evals.sweep.queue import Given
from prunekit_evals.sweep.worker import Setup, Worker


class LocalPool:
    """Processes by number, one for each device. A context manager; on leaving it they are ended."""

    def __init__(self, setup: Setup, devices: Sequence[str | None]) -> None:
        self.setup, self.devices = setup, tuple(devices)
        self._context = _context(setup, devices)
        self._processes: dict[int, BaseProcess] = {}
        self._pipes: dict[int, Connection] = {}

    @property
    def size(self) -> int:
        """How many workers."""
        return len(self.devices)

    def __enter__(self) -> LocalPool:
        return self

    def __exit__(self, *_: object) -> None:
        for number in list(self._processes):
            self._end(number)

    def start(self, number: int) -> None:
        """Begin a worker, the first time or in place of a dead one."""
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=serve, args=(theirs, self.setup, self.devices[number]), daemon=True
        )
        process.start()
        theirs.close()
        self._processes[number], self._pipes[number] = process, ours

    def submit(self, number: int, given: Given) -> None:
        """Hand a job to a worker that has started and does nothing."""
        try:
            self._pipes[number].send(given)
        except OSError:  # it is dead, which `wait` tells
            return

    def wait(self, seconds: float) -> list[Event]:
        """What happened, at once or within so many seconds."""
        numbers = {id(pipe): number for number, pipe in self._pipes.items()}
        ready = wait(list(self._pipes.values()), timeout=seconds)
        return [self._event(numbers[id(pipe)]) for pipe in ready]

    def _event(self, number: int) -> Event:
        try:
            told = self._pipes[number].recv()
        except (EOFError, OSError):
            return Died(number, self._end(number))
        return Started(number) if told is None else Finished(number, told)

    def _end(self, number: int) -> str:
        """End a worker, if it still lives; why it ended."""
        process, pipe = self._processes.pop(number), self._pipes.pop(number)
        pipe.close()
        process.join(1)
        if process.is_alive():
            process.kill()
            process.join()
        code = process.exitcode or 0
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        return f"it ended with exit code {code}"


def serve(pipe: Connection, setup: Setup, device: str | None) -> None:
    """The life of a worker: it answers jobs until nobody is left to ask."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver is interrupted, and ends it
    sys.stdout = sys.stderr  # stdout is for the table
    try:
        worker = Worker(setup, device)
        pipe.send(None)
        while True:
            pipe.send(worker.compute(pipe.recv()))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def _context(setup: Setup, devices: Sequence[str | None]) -> Any:
    """How processes begin. For the CPU they are forked off a server that has imported everything and run nothing, so
    that the next one is there at once; CUDA does not survive a fork.
    """
    on_cpu = all(device == "cpu" for device in devices)
    if not (on_cpu and "forkserver" in multiprocessing.get_all_start_methods()):
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["prunekit_evals.sweep.preload"])
    if setup.threads:
        os.environ.setdefault("OMP_NUM_THREADS", str(setup.threads))  # which libraries read when they are imported
    return context
