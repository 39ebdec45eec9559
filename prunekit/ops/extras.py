"""Putting new states into the slots of kept tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def slot_weights(slots: Tensor, size: int) -> Tensor:
    """The weights of a `Selection` whose extras stand in these slots: float32 (size, size + E) for int64 (E,).

    Every other token stays as it is. The slots of one sample, none twice.
    """
    weights = torch.eye(size, size + len(slots), device=slots.device)
    weights[slots, slots] = 0
    weights[slots, size + torch.arange(len(slots), device=slots.device)] = 1
    return weights
