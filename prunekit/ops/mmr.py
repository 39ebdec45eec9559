"""Maximal marginal relevance: each choice weighs a token's score against its likeness to the tokens chosen before."""

from __future__ import annotations

import torch
from torch import Tensor

from prunekit.ops.greedy import GreedyCount, choose, row_at


@torch.no_grad()
def mmr(
    scores: Tensor, similarity: Tensor, count: GreedyCount, balance: float = 0.5, valid: Tensor | None = None
) -> Tensor:
    """Indices in the order of choice: int64 (B, T), T the largest count; -1 where a row has no more to choose.

    scores: float (B, V), on the scale of the similarities (`min_max` brings them there). similarity: float (B, V, V),
    symmetric. The first token is the one with the highest score; then always the one with the largest
    `balance * score - (1 - balance) * largest similarity to a chosen token`. Ties: lower index.

    Source: Carbonell and Goldstein 1998 (https://doi.org/10.1145/290941.291025); for visual tokens IDPruner
    (Tencent/AngelSlim@67394ce), one token a step.
    """
    closest = torch.full_like(similarity[..., 0], -torch.inf)

    def after(pick: Tensor) -> Tensor:
        nonlocal closest
        closest = torch.maximum(closest, row_at(similarity, pick))
        return balance * scores - (1 - balance) * closest

    return choose(scores, after, count, valid)
