"""Stable ranking and top-k: the highest scores win, on ties the lower index."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from prunekit.ops.host import on_device

Counts: TypeAlias = int | Sequence[int] | Tensor


def sortable(scores: Tensor) -> Tensor:
    """Finite or +inf, in a floating dtype: NaN and -inf become the lowest number, so that -inf is free for "never"."""
    if not scores.is_floating_point():
        scores = scores.double()
    lowest = torch.finfo(scores.dtype).min
    return scores.nan_to_num(nan=lowest, posinf=torch.inf, neginf=lowest)


def per_row(count: Counts, device: torch.device) -> Tensor:
    """The counts as a tensor that broadcasts over the last axis: int64 () or (B, 1)."""
    if isinstance(count, Tensor):
        limit = count.to(device)
        return limit if limit.ndim == 0 else limit.unsqueeze(-1)
    if isinstance(count, Sequence):
        return on_device(count, device).unsqueeze(-1)
    return torch.full((), count, device=device)


def ranks(scores: Tensor, valid: Tensor | None = None) -> Tensor:
    """The place of each entry in its row's order, 0 for the highest: int64 of the shape of `scores`.

    scores: float, integer or bool (B, V). valid: bool (B, V); entries that are not valid come last. Ties: lower index
    first. NaN counts as lowest.
    """
    scores = sortable(scores)
    if valid is not None:
        scores = scores.masked_fill(~valid, -torch.inf)
    order = scores.argsort(dim=-1, descending=True, stable=True)
    positions = torch.arange(scores.shape[-1], device=scores.device)
    return torch.empty_like(order).scatter_(-1, order, positions.expand_as(order))


def top_k_mask(scores: Tensor, count: Counts, valid: Tensor | None = None) -> Tensor:
    """True at the `count` highest scores of each row: bool of the shape of `scores`.

    scores: float, integer or bool (B, V). count: one number, one for each row, or an int64 tensor (B,), which may stay
    on the device. valid: bool (B, V), False entries are never chosen. Ties: lower index first. NaN counts as lowest.
    """
    mask = ranks(scores, valid) < per_row(count, scores.device)
    return mask if valid is None else mask & valid
