"""The loop that greedy selections share: take the best token, update what the others would gain, again."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from prunekit.ops.topk import per_row, sortable

GreedyCount = int | Sequence[int]


def steps_of(count: GreedyCount, tokens: int) -> int:
    """How many tokens the fullest row chooses at most."""
    return min(count if isinstance(count, int) else max(count, default=0), tokens)


def choose(
    gain: Tensor, after: Callable[[Tensor], Tensor], count: GreedyCount, valid: Tensor | None, at_once: int = 1
) -> Tensor:
    """Indices in the order of choice: int64 (B, T), T the largest count; -1 where a row has no more to choose.

    gain: float (B, V), what each token would gain as the first. after: the gains once the tokens `pick`, int64 (B, n),
    are chosen as well; what it says of tokens that are chosen already is ignored. at_once: how many a step takes, the
    last one perhaps fewer.
    """
    if at_once > 1:
        return _several(gain, after, count, valid, at_once)
    closed = torch.zeros_like(gain, dtype=torch.bool) if valid is None else ~valid
    most = per_row(count, gain.device).minimum((~closed).sum(-1, keepdim=True))
    picks: list[Tensor] = []
    for _ in range(steps_of(count, gain.shape[-1])):
        if picks:
            gain = after(picks[-1])
        pick = sortable(gain).masked_fill(closed, -torch.inf).argmax(-1, keepdim=True)
        closed = closed.scatter(-1, pick, True)
        picks.append(pick)
    if not picks:
        return torch.empty(*gain.shape[:-1], 0, dtype=torch.int64, device=gain.device)
    order = torch.cat(picks, dim=-1)
    return order.masked_fill(torch.arange(len(picks), device=gain.device) >= most, -1)


def _several(
    gain: Tensor, after: Callable[[Tensor], Tensor], count: GreedyCount, valid: Tensor | None, at_once: int
) -> Tensor:
    """As `choose`, by a sort in each step."""
    closed = torch.zeros_like(gain, dtype=torch.bool) if valid is None else ~valid
    most = per_row(count, gain.device).minimum((~closed).sum(-1, keepdim=True))
    steps = steps_of(count, gain.shape[-1])
    picks = [torch.empty(*gain.shape[:-1], 0, dtype=torch.int64, device=gain.device)]
    for begin in range(0, steps, at_once):
        if begin:
            gain = after(picks[-1])
        best = sortable(gain).masked_fill(closed, -torch.inf).argsort(dim=-1, descending=True, stable=True)
        picks.append(best[..., : min(at_once, steps - begin)])
        closed = closed.scatter(-1, picks[-1], True)
    order = torch.cat(picks, dim=-1)
    return order.masked_fill(torch.arange(steps, device=gain.device) >= most, -1)


def row_at(matrix: Tensor, pick: Tensor) -> Tensor:
    """The row of each sample's matrix, float (B, R, V), at its index `pick`, int64 (B, 1): float (B, V).

    Indices stay tensors: a Python number would wait for the device.
    """
    index = pick.unsqueeze(-1).expand(*pick.shape, matrix.shape[-1])
    return matrix.gather(-2, index).squeeze(-2)


def column_at(matrix: Tensor, pick: Tensor) -> Tensor:
    """The same for the column: float (B, R)."""
    index = pick.unsqueeze(-2).expand(*pick.shape[:-1], matrix.shape[-2], 1)
    return matrix.gather(-1, index).squeeze(-1)


def index_mask(indices: Tensor, size: int) -> Tensor:
    """True at the indices of each row: bool (B, size) for int64 (B, T); -1 stands for no index."""
    # One entry more takes what is no index.
    mask = torch.zeros(*indices.shape[:-1], size + 1, dtype=torch.bool, device=indices.device)
    return mask.scatter_(-1, indices.masked_fill(indices < 0, size), True)[..., :size]
