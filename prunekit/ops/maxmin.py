"""Greedy max-min choice: repeatedly the item that is farthest from everything chosen so far."""

from __future__ import annotations

import torch
from torch import Tensor


def max_min(distance: Tensor, count: int) -> Tensor:
    """Indices of `count` items in the order of choice: int64 (count,).

    distance: float (V, V), symmetric. The first item is the one whose nearest other item is farthest; then always the
    one with the largest distance to its nearest chosen item. The lower index wins ties. The rule is DivPrune's
    (https://arxiv.org/abs/2503.02175). A distance that is NaN counts as 0, so that `count` items are
    chosen all the same.
    """
    distance = distance.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
    items = distance.shape[0]
    # The smallest entry of a column is the item itself.
    nearest = distance.kthvalue(min(2, items), dim=0).values
    picks: list[Tensor] = []
    gap = nearest
    for _ in range(min(count, items)):
        # One-element index tensors stay on the device; a scalar index would wait for it.
        pick = gap.argmax(0, keepdim=True)
        row = distance.index_select(0, pick)[0]
        # A chosen item is at -inf, and the minimum leaves it there.
        gap = (torch.minimum(gap, row) if picks else row).index_fill(0, pick, -torch.inf)
        picks.append(pick)
    return torch.cat(picks) if picks else torch.empty(0, dtype=torch.int64, device=distance.device)
