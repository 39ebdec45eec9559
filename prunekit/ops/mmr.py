"""Maximal marginal relevance: each choice weighs a token's score against its likeness to the tokens chosen before."""

from __future__ import annotations

import torch
from torch import Tensor

from prunekit.ops.greedy import GreedyCount, choose, row_at


@torch.no_grad()
def mmr(
    scores: Tensor,
    similarity: Tensor,
    count: GreedyCount,
    balance: float = 0.5,
    valid: Tensor | None = None,
    at_once: int = 1,
) -> Tensor:
    """Indices in the order of choice: int64 (B, T), T the largest count; -1 where a row has no more to choose.

    scores: float (B, V), on the scale of the similarities (`min_max` brings them there). similarity: float (B, V, V),
    symmetric. The first token is the one with the highest score; then always the one with the largest
    `balance * score - (1 - balance) * largest similarity to a chosen token`. Ties: lower index.
    at_once: how many tokens a step takes, the last step perhaps fewer; those of one step are not compared with each
    other.

    Source: Carbonell and Goldstein 1998 (https://doi.org/10.1145/290941.291025); for visual tokens IDPruner
    (Tencent/AngelSlim@67394ce).
    """
    closest = torch.full_like(similarity[..., 0], -torch.inf)

    def after(pick: Tensor) -> Tensor:
        nonlocal closest
        for one in torch.split(pick, 1, dim=-1):
            closest = torch.maximum(closest, row_at(similarity, one))
        return balance * scores - (1 - balance) * closest

    return choose(scores, after, count, valid, at_once)
