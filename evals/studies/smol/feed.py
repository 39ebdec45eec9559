"""Scenes and their rows, drawn by worker processes ahead of the training step.

Workers are forked before anything touches a GPU and write images into memory they share with the parent; only numbers
of slots and the rows travel through a queue. Which scenes are drawn follows from the seed; their order does not.
"""

from __future__ import annotations

import itertools
import mmap
import multiprocessing
import queue
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from prunekit_evals.micro.compose import IMAGE_SIZE, Scene, scene
from prunekit_evals.studies.smol import rows, see

TRAIN_SEEDS = 1 << 40  # scenes of training lie above and below 1 << 50; what is held out lies elsewhere
BYTES = IMAGE_SIZE * IMAGE_SIZE * 3
SLOTS = 3  # images of so many batches a worker may wait in memory

Draw = Callable[[Scene, np.random.Generator], list[list[rows.Row]]]  # groups of rows about one scene
# What is asked about images, and about texts alone.
MODES: dict[str, tuple[Draw, ...]] = {
    "see": (), "easy": (rows.easy,),
    **{f"letters {n}": (rows.easy, partial(rows.letters, level=n, count=4)) for n in range(rows.LEVELS)},
    "late": (rows.late, partial(rows.letters, level=rows.LEVELS - 1, count=1)),
}  # fmt: skip


@dataclass(frozen=True)
class Batch:
    """Images uint8 `[B, 168, 168, 3]`, classes of `see.labels`, and rows: of images, then of texts alone."""

    mode: str
    images: np.ndarray
    labels: np.ndarray
    rows: tuple[rows.Rows, ...]


def make(encoder: rows.Encoder, mode: str, seeds: range) -> Batch:
    """The batch of these scenes; a function of the mode and the seeds."""
    scenes = [scene(seed) for seed in seeds]
    rng = np.random.default_rng([seeds.start, 5])
    made = tuple(encoder.rows(list(zip(*(draw(s, rng) for s in scenes), strict=True))) for draw in MODES[mode])
    return Batch(mode, np.stack([s.image for s in scenes]), see.labels(scenes), made)


class Feed:
    """Batches of `batch` scenes of the latest mode. Without workers they are drawn where they are taken."""

    def __init__(self, encoder: rows.Encoder, seed: int, workers: int, batch: int) -> None:
        self._encoder, self._batch, self._base = encoder, batch, TRAIN_SEEDS + (seed << 37)
        self._count = itertools.count()
        self.mode = "see"
        self._workers: list[Any] = []
        if not workers:
            return
        context = multiprocessing.get_context("fork")
        self._wanted = context.Value("i", 0)
        self._full: Any = context.Queue()
        self._free: Any = context.Queue()
        self._memory = mmap.mmap(-1, workers * SLOTS * batch * BYTES)
        self._images = np.frombuffer(self._memory, np.uint8).reshape(-1, batch, IMAGE_SIZE, IMAGE_SIZE, 3)
        for number in range(workers):
            self._workers.append(context.Process(target=self._work, args=(number,), daemon=True))
            self._workers[-1].start()
        for slot in range(workers * SLOTS):
            self._free.put(slot)

    @property
    def busy(self) -> bool:
        """Whether workers draw ahead, so that taking all that is ready costs nothing."""
        return bool(self._workers)

    def ask(self, mode: str) -> None:
        """From now on batches are of this mode."""
        self.mode = mode
        if self._workers:
            self._wanted.value = list(MODES).index(mode)

    def take(self, wait: bool = True) -> Batch | None:
        """The next batch of the mode; None if none is ready and `wait` is false. Raises what a worker raised."""
        if not self._workers:
            return make(self._encoder, self.mode, self._seeds(0, next(self._count)))
        while True:
            try:
                mode, slot, labels, made = self._full.get(wait, 120 if wait else None)
            except queue.Empty:
                if wait:
                    raise RuntimeError("no worker has drawn a scene for two minutes") from None
                return None
            if slot is None:
                raise RuntimeError(f"a worker that draws scenes failed:\n{mode}")
            images = self._images[slot].copy() if mode == self.mode else None
            self._free.put(slot)
            if images is not None:
                return Batch(mode, images, labels, made)

    def close(self) -> None:
        for worker in self._workers:
            worker.terminate()
            worker.join()
        if self._workers:
            self._free.cancel_join_thread()

    def _seeds(self, number: int, index: int) -> range:
        first = self._base + (number << 31) + index * self._batch
        return range(first, first + self._batch)

    def _work(self, number: int) -> None:
        try:
            for index in itertools.count():
                slot = self._free.get()
                mode = list(MODES)[self._wanted.value]
                batch = make(self._encoder, mode, self._seeds(number, index))
                self._images[slot] = batch.images
                self._full.put((mode, slot, batch.labels, batch.rows))
        except Exception:
            self._full.put((traceback.format_exc(), None, None, None))
