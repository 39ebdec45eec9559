"""Greedy coverage (facility location): each choice is the token that adds most to how well all targets are covered."""

from __future__ import annotations

import torch
from torch import Tensor

from prunekit.ops.greedy import GreedyCount, choose, column_at
from prunekit.ops.scale import precise


@torch.no_grad()
def coverage(
    similarity: Tensor,
    count: GreedyCount,
    weights: Tensor | None = None,
    saliency: Tensor | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """Indices in the order of choice: int64 (B, T), T the largest count; -1 where a row has no more to choose.

    similarity: float (B, R, V), how well token j would cover target i. Targets may be the tokens themselves (R = V),
    words of the question, or both, one below the other. A target is covered as well as by the best chosen token, and by
    0 before the first: what is not above 0 covers nothing. The gain of a token is the sum over all targets of what it
    adds to their coverage, times its `saliency`. Ties: lower index.
    weights: float or bool (B, R), of the targets in that sum; None: 1. Where targets are tokens, `valid` leaves out
    padding.
    saliency: float (B, V), above 0; None: 1.
    valid: bool (B, V), tokens that may be chosen.
    Sums are in float32 or float64. Each step reads the whole matrix: O(T R V) time, O(R V) memory.

    Source: MMTok (https://arxiv.org/abs/2508.18264, Ironieser/MMTok@d1522cd), whose targets are words and tokens; SCOPE
    (https://arxiv.org/abs/2510.24214, kinredon/SCOPE@6bf7306), whose saliency is a power of the CLS attention.
    """
    similarity = precise(similarity).nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
    covered = torch.zeros_like(similarity[..., 0])

    def gains() -> Tensor:
        added = (similarity - covered.unsqueeze(-1)).clamp_(min=0.0)
        total = added.sum(-2) if weights is None else (weights.to(added.dtype).unsqueeze(-2) @ added).squeeze(-2)
        return total if saliency is None else total * saliency

    def after(pick: Tensor) -> Tensor:
        nonlocal covered
        covered = torch.maximum(covered, column_at(similarity, pick))
        return gains()

    return choose(gains(), after, count, valid)
