"""How many tokens matter: those whose score is an outlier by the interquartile range."""

from __future__ import annotations

import torch
from torch import Tensor

from prunekit.ops.scale import precise


@torch.no_grad()
def outliers(scores: Tensor, valid: Tensor | None = None, factor: float = 1.5) -> Tensor:
    """True where a score lies above Q3 + factor * (Q3 - Q1) of its row: bool (B, V).

    scores: float (B, V). valid: bool (B, V). Quartiles are those of the valid entries that are not NaN, interpolated
    linearly between neighbours as by `numpy.percentile`. The number of True entries is the adaptive count of a row; it
    may be 0.

    Source: Tukey's fences; LLaVA-PruMerge (https://arxiv.org/abs/2403.15388, 42Shawn/LLaVA-PruMerge@097c041) and TRIM
    (https://arxiv.org/abs/2409.10994, FreedomIntelligence/TRIM@f5a232d).
    """
    scores = precise(scores)
    present = ~scores.isnan() if valid is None else valid & ~scores.isnan()
    ascending = scores.masked_fill(~present, torch.inf).sort(dim=-1).values
    last = present.sum(-1, keepdim=True) - 1
    low, high = _quantile(ascending, last, 0.25), _quantile(ascending, last, 0.75)
    return (scores > high + factor * (high - low)) & present


def _quantile(ascending: Tensor, last: Tensor, share: float) -> Tensor:
    """The value at `share` of the way to the index `last`, int64 (B, 1): float (B, 1)."""
    position = (last * share).clamp(min=0.0)
    below = position.floor().long()
    start, end = ascending.gather(-1, below), ascending.gather(-1, (below + 1).minimum(last.clamp(min=0)))
    return torch.lerp(start, end, (position - below).to(ascending.dtype))
