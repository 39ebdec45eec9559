"""Numbers of the host on a device, without waiting for what the device still computes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def on_device(numbers: Sequence[int], device: torch.device | None) -> Tensor:
    """`numbers` as int64 (len,) on `device`; None: the CPU.

    `torch.tensor(numbers, device=...)` lets the host wait until a GPU has done all that it was given before, after
    which the GPU waits for the host.
    """
    made = torch.tensor(numbers, dtype=torch.int64)
    return made if device is None else made.to(device, non_blocking=True)
