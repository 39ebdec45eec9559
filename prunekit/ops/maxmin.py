"""Greedy max-min choice: repeatedly the token that is farthest from everything chosen so far."""

from __future__ import annotations

import torch
from torch import Tensor

from prunekit.ops.greedy import GreedyCount, choose, row_at


@torch.no_grad()
def max_min(distance: Tensor, count: GreedyCount, valid: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
    """Indices in the order of choice: int64 (B, T), T the largest count; -1 where a row has no more to choose.

    distance: float (B, V, V), symmetric, each token nearest to itself. The first token is the one whose nearest other
    token is farthest; then always the one with the largest distance to its nearest chosen token. Ties: lower index. A
    distance that is NaN counts as 0.
    weights: float (B, V), by which the distances of a token are multiplied where it is compared with others; None: 1.
    With negative ones, too, the first token is the one with the largest second smallest distance, its own among them.

    Source: DivPrune (https://arxiv.org/abs/2503.02175, vbdi/divprune@799e2d9); with weights FlashVID
    (https://arxiv.org/abs/2602.08024, Fanziyang-v/FlashVID@1d37422).
    """
    if weights is not None:
        distance = distance * weights.unsqueeze(-2)
    distance = distance.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
    if valid is not None:
        distance = distance.masked_fill(~valid.unsqueeze(-1), torch.inf)
    gap = torch.full_like(distance[..., 0], torch.inf)

    def after(pick: Tensor) -> Tensor:
        nonlocal gap
        gap = torch.minimum(gap, row_at(distance, pick))
        return gap

    # The smallest entry of a column is the token itself.
    nearest = distance.kthvalue(min(2, distance.shape[-1]), dim=-2).values
    return choose(nearest, after, count, valid)
