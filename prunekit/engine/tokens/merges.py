"""Carrying out a merge: what stands in the slots of kept tokens afterwards.

Merging patches by their groups: https://arxiv.org/abs/2210.09461.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prunekit.strategy.decisions import Owners


def merged(how: Tensor | Owners, tokens: Tensor, sizes: Tensor, extras: Tensor | None = None) -> Tensor:
    """The merged tokens, float (B, V, ...); those of tokens that are not kept mean nothing.

    how: checked, as `Selection.weights`. tokens: float (B, V, ...), zeros on padding. sizes: float (B, V), how many
    original tokens each stands for. extras: float (B, E, ...), what the last columns of a matrix take.
    """
    if isinstance(how, Owners):
        return _by_owner(how, tokens, sizes)
    many = how.shape[-1] - tokens.shape[1]  # no sample that merges has more extras
    whole = tokens if extras is None else torch.cat([tokens, extras[:, :many].to(tokens)], dim=1)
    return (how.to(tokens) @ whole.flatten(2)).view_as(tokens)


def _by_owner(how: Owners, tokens: Tensor, sizes: Tensor) -> Tensor:
    """Sums over groups in at least float32, without a matrix."""
    wide = torch.promote_types(tokens.dtype, torch.float32)
    owner = how.owner.to(tokens.device)
    nowhere, owner = owner < 0, owner.clamp_min(0)
    factors = {"mean": torch.ones_like(sizes), "size_mean": sizes, "sum": how.amounts}[how.mode]
    assert factors is not None, "checked by Owners"
    factors = factors.to(tokens.device, wide).masked_fill(nowhere, 0)
    if how.mode != "sum":
        totals = torch.zeros_like(factors).scatter_add(1, owner, factors).gather(1, owner)
        factors = (factors / totals).masked_fill(nowhere, 0)
    parts = tokens.flatten(2).to(wide) * factors[..., None]
    rows = torch.arange(len(owner), device=owner.device)[:, None] * owner.shape[1]
    sums = parts.new_zeros(owner.numel(), parts.shape[-1]).index_add(0, (owner + rows).flatten(), parts.flatten(0, 1))
    return sums.view_as(tokens).to(tokens.dtype)


def matrices_together(keep: Tensor, matrices: dict[int, Tensor]) -> Tensor:
    """Weights of single samples, float (v, v + e) by row, as those of the batch. keep: what it keeps, bool (B, V)."""
    width = keep.shape[1]
    extras = max(one.shape[1] - one.shape[0] for one in matrices.values())
    some = next(iter(matrices.values()))
    blank = torch.eye(width, width + extras, dtype=some.dtype, device=some.device)
    return torch.stack([_padded(matrices.get(b), blank) for b in range(len(keep))])


def _padded(weights: Tensor | None, blank: Tensor) -> Tensor:
    """One sample's weights (v, v + E) in the batch's (V, V + E); `blank` leaves every token as it is."""
    if weights is None:
        return blank
    many, width = len(weights), blank.shape[0]
    extras = weights.shape[1] - many
    top = torch.cat([weights[:, :many], blank[:many, many:width], weights[:, many:]], dim=1)
    top = torch.cat([top, top.new_zeros(many, blank.shape[1] - width - extras)], dim=1)
    return torch.cat([top, blank[many:]])
