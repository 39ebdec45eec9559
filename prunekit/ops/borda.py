"""Fusing several rankings into one: a weighted Borda count."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prunekit.ops.topk import ranks


def borda(scores: Sequence[Tensor], weights: Sequence[float] | None = None, valid: Tensor | None = None) -> Tensor:
    """Points of each token, higher is better: float64 (B, V).

    In each of the rankings that `scores`, float (B, V) each, stand for, the best of n valid tokens has n points, the
    next n - 1, the last 1 (ties: lower index first); `weights`, one for each ranking, None: 1, weighs them. Only the
    order within each ranking counts, so rankings of any scale mix. Padding has 0 points.

    Source: TokenCarve fuses attention and information ranks so (https://arxiv.org/abs/2503.10501,
    ShawnTan86/TokenCarve@a57bd59).
    """
    present = torch.ones_like(scores[0], dtype=torch.bool) if valid is None else valid
    entries = present.sum(-1, keepdim=True)
    points = torch.zeros(present.shape, dtype=torch.float64, device=present.device)
    for one, weight in zip(scores, weights or [1.0] * len(scores), strict=True):
        points = points + weight * (entries - ranks(one, valid))
    return points.masked_fill(~present, 0.0)
