"""Stable top-k as a mask: the highest scores win, on ties the lower index."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def top_k_mask(scores: Tensor, count: int | Sequence[int], valid: Tensor | None = None) -> Tensor:
    """True at the `count` highest scores of each row: bool of the shape of `scores`.

    scores: float (V,) or (B, V). count: one number, or one for each row. valid: bool like `scores`, False entries are
    never chosen; None: all may be. A row with fewer valid entries than `count` keeps all of them. NaN counts as lowest,
    so that an overflow elsewhere changes which entries are chosen but never how many.
    """
    if scores.is_floating_point():
        lowest = torch.finfo(scores.dtype).min
        scores = scores.nan_to_num(nan=lowest, posinf=torch.inf, neginf=lowest)
    if valid is not None:
        scores = scores.masked_fill(~valid, -torch.inf)
    order = scores.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(scores.shape[-1], device=scores.device)
    rank = torch.empty_like(order).scatter_(-1, order, places.expand_as(order))
    limit = torch.as_tensor(count, device=scores.device)
    mask = rank < (limit if limit.ndim == 0 else limit.unsqueeze(-1))
    return mask if valid is None else mask & valid
