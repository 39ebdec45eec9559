"""What all pipelines are asked on one task alike: the prompts as they were read, what the processor made of them, and
what the vision tower saw for those pipelines that leave it alone.

It is computed once for all cells of the task that one process computes, as far as there is room. Nothing of it depends
on the pipeline, so that answers are the same with it and without.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from prunekit_evals.run.prompts import Prompt
from prunekit_evals.run.seen import Seen

ROOM = 512 * 2**20  # bytes of one process


class Kept:
    """Prompts and model inputs of one task. room: in bytes; 0 keeps nothing.

    What comes first is kept, and nothing is given up for what comes later: cells ask for all of it in the same order,
    by which a store that forgets the oldest would always have forgotten what is asked for next.
    """

    def __init__(self, room: int = 0) -> None:
        self.room, self._free = room, room
        self._task = ""
        self._prompts: dict[Hashable, Prompt] = {}
        self._inputs: dict[tuple[str, ...], Any] = {}
        self._seen: dict[tuple[str, ...], Seen] = {}

    def begin(self, task: str) -> None:
        """Cells of this task follow: what is kept of another one goes."""
        if task != self._task:
            self._task, self._free = task, self.room
            self._prompts, self._inputs, self._seen = {}, {}, {}

    def prompt(self, key: Hashable, make: Callable[[], Prompt]) -> Prompt:
        """The prompt of a request. key: tells it from the others of the task."""
        if not self.room:
            return make()
        found = self._prompts.get(key)
        if found is None:
            found = make()
            size = sum(image.width * image.height * len(image.getbands()) for image in found.images)
            # Videos are decoded when they are asked for, and would be held beyond the room.
            if not found.videos and self._admitted(size):
                self._prompts[key] = found
        return found

    def inputs(self, prompts: Sequence[Prompt], make: Callable[[], Any]) -> Any:
        """What the processor makes of these prompts together; the caller may add to it and move it elsewhere."""
        if not self.room:
            return make()
        key = tuple(prompt.digest() for prompt in prompts)
        found = self._inputs.get(key)
        if found is None:
            found = make()
            tensors = (value for value in found.values() if isinstance(value, torch.Tensor))
            if self._admitted(sum(tensor.numel() * tensor.element_size() for tensor in tensors)):
                self._inputs[key] = found
        return copy.copy(found)

    def seen(self, prompts: Sequence[Prompt], make: Callable[[], Seen]) -> Seen:
        """What the tower saw of the images of these prompts."""
        key = tuple(prompt.digest() for prompt in prompts)
        found = self._seen.get(key)
        if found is None:
            found = make()
            if self._admitted(found.size):
                self._seen[key] = found
        return found

    def _admitted(self, size: int) -> bool:
        if size > self._free:
            return False
        self._free -= size
        return True
