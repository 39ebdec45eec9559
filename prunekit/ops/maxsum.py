"""Greedy max-sum choice: repeatedly the token that is least like all chosen ones together."""

from __future__ import annotations

import torch
from torch import Tensor

from prunekit.ops.greedy import GreedyCount, choose, row_at


@torch.no_grad()
def max_sum(similarity: Tensor, scores: Tensor, count: GreedyCount, valid: Tensor | None = None) -> Tensor:
    """Indices in the order of choice: int64 (B, T), T the largest count; -1 where a row has no more to choose.

    similarity: float (B, V, V), symmetric. scores: float (B, V); the first token is the one with the highest, and they
    are not looked at again. Then always the token with the lowest sum of similarities to the chosen ones. Ties: lower
    index. A similarity that is NaN counts as 0. Sums are in float32 or float64.

    Source: ToDRE (https://arxiv.org/abs/2505.18757), whose first token is the one that CLS attends to most.
    """
    wide = torch.promote_types(similarity.dtype, torch.float32)
    similarity = similarity.to(wide).nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
    total = torch.zeros_like(similarity[..., 0])

    def after(pick: Tensor) -> Tensor:
        nonlocal total
        total = total + row_at(similarity, pick)
        return -total

    return choose(scores.to(wide), after, count, valid)
