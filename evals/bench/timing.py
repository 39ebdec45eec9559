"""How the benchmarks measure: interleaved rounds, medians, and the peak of what tensors hold at once."""

from __future__ import annotations

import gc
import random
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Enters what a run needs (a pipeline on the model, a filled cache) and gives the run itself, which alone is timed.
Case = Callable[[], AbstractContextManager[Callable[[], Any]]]


@dataclass(frozen=True)
class Time:
    """Seconds of one run: of the processor, and of the clock on the wall."""

    cpu: float
    wall: float


@contextmanager
def settled() -> Iterator[None]:
    """Within it, collecting garbage looks at what is made within it: modules and models would take a second a time."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@settled()
def interleaved(cases: Mapping[str, Case], rounds: int, label: str = "") -> dict[str, list[Time]]:
    """Time every case `rounds` times, in a new order each round, after one round that does not count.

    Whatever else the machine does meets all cases alike. label: of the progress line on a terminal.
    """
    times: dict[str, list[Time]] = {name: [] for name in cases}
    order = list(cases)
    for number in range(rounds + 1):
        random.Random(number).shuffle(order)
        for name in order:
            with torch.inference_mode(), cases[name]() as run:
                gc.collect()
                wall, cpu = time.perf_counter(), time.process_time()
                run()
                taken = Time(time.process_time() - cpu, time.perf_counter() - wall)
            times[name] += [taken] * (number > 0)
        if sys.stderr.isatty():
            sys.stderr.write(f"\r{label}: round {number} of {rounds}" + "\n" * (number == rounds))
    return times


def median(times: Sequence[Time]) -> Time:
    """The medians of both clocks, each by itself."""
    return Time(statistics.median(t.cpu for t in times), statistics.median(t.wall for t in times))


def paired(times: Sequence[Time], base: Sequence[Time]) -> float:
    """The median over rounds of the processor time beyond that of `base` in the same round, in seconds."""
    return statistics.median(own.cpu - other.cpu for own, other in zip(times, base, strict=True))


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of all storages that operations make while it is on; `peak` is the most held at once.

    Exact and the same in every run, unlike the resident size of a process. It does not see what was there before, such
    as the weights, nor what a kernel takes and gives back by itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        held = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage(), held)
        return result

    def _add(self, storage: torch.UntypedStorage, held: set[int]) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen or key in held:  # a view of what is counted, or of what was there before
            return
        self._seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size
