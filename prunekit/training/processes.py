"""Several processes that train one router, through Accelerate if they were started by it; otherwise only this one.

Each process takes every n-th prompt of a batch and the gradients are added up, so that a step is the same step.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from prunekit.errors import InputError

T = TypeVar("T")
LAUNCH = "start them by `accelerate launch` or, on a CPU, by `torchrun`; for one process alone unset WORLD_SIZE"


class Processes:
    """This process among `count`, with its number and its device (None: the caller's choice).

    wanted: the device that the user named; `cpu` takes the CPU where there is a GPU. Raises InputError for a process
    that should have others and does not reach them, since each would train by itself.
    """

    def __init__(self, wanted: str | None = None) -> None:
        self.count, self.number = int(os.environ.get("WORLD_SIZE", "1")), 0
        self.device: torch.device | None = None
        self._accelerator: Any = None
        if self.count > 1:
            try:
                from accelerate import Accelerator
            except ImportError as error:
                raise InputError(
                    "training in several processes needs accelerate (pip install prunekit[train])"
                ) from error
            # It forms no group of processes on a machine without a GPU unless it is told to use the CPU.
            try:
                self._accelerator = Accelerator(cpu=wanted == "cpu" or not torch.accelerator.is_available())
            except ValueError as error:
                raise InputError(f"the {self.count} processes do not find each other: {error} ({LAUNCH})") from error
            if self._accelerator.num_processes != self.count:
                running = self._accelerator.num_processes
                raise InputError(f"WORLD_SIZE says {self.count} processes, and {running} are running ({LAUNCH})")
            self.number, self.device = self._accelerator.process_index, self._accelerator.device

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and output."""
        return self.number == 0

    def check_batch(self, batch: int) -> None:
        """Raise InputError for a batch in which a process would have no prompt."""
        if batch < self.count:
            raise InputError(
                f"{self.count} processes cannot share a batch of {batch} (set batch higher, or start fewer processes)"
            )

    def share(self, items: Sequence[T]) -> list[T]:
        """The items of this process."""
        return list(items[self.number :: self.count])

    def sums(self, values: Sequence[float]) -> list[float]:
        """Each value added up over the processes, in double precision."""
        if self._accelerator is None:
            return list(values)
        device = self.device or torch.device("cpu")
        wide = torch.float32 if device.type == "mps" else torch.float64
        totals: list[float] = self._accelerator.reduce(torch.tensor(values, dtype=wide, device=device), "sum").tolist()
        return totals

    def add_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace each gradient by the sum over the processes."""
        if self._accelerator is None:
            return
        for parameter in parameters:
            grad: Tensor = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = self._accelerator.reduce(grad, "sum")

    def wait(self) -> None:
        """Until every process has come to this point."""
        if self._accelerator is not None:
            self._accelerator.wait_for_everyone()
