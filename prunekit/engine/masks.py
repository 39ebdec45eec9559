"""Logical attention masks to physical ones.

transformers makes one mask for the complete sequence; a layer that runs on fewer tokens, or attends to fewer cached
ones, needs the matching rows and columns of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prunekit.engine.layout import Layout


def prefill_mask(mask: Tensor | None, layout: Layout, like: Tensor, additive: bool) -> Tensor | None:
    """The mask for a prefill whose queries and keys are both the slots of `layout`.

    mask: None (plain causal), bool or additive (B|1, 1, S, S). Returns None where plain causal attention is right,
    else (B, 1, K, K) of the same kind as `mask`; `additive` says which kind to make when `mask` is None.
    like: a tensor with the device and dtype of the queries.
    """
    if mask is None and layout.valid is None:
        return None
    if mask is None:
        causal = torch.ones(layout.width, layout.width, dtype=torch.bool, device=like.device).tril()
        local = causal.expand(layout.index.shape[0], 1, -1, -1)
        return _closed(local, layout, additive, like.dtype)
    local = layout.gather(layout.gather(mask, dim=2), dim=3)
    return local if layout.valid is None else _closed(local, layout, additive, like.dtype)


def decode_mask(
    mask: Tensor | None, layout: Layout, tail: int, queries: int, like: Tensor, additive: bool
) -> Tensor | None:
    """The mask for `queries` new tokens on a cache that holds the slots of `layout` and, after them, `tail` later
    tokens.

    mask: None (the new tokens see everything) or (B|1, 1, Q, S + tail), where the tail contains the new tokens.
    Returns None or (B, 1, Q, K + tail).
    """
    valid = layout.valid
    if mask is not None:
        local = torch.cat([layout.gather(mask[..., : layout.length], dim=3), _tail(mask, layout)], dim=3)
        if valid is None:
            return local
        hidden = torch.cat([~valid, valid.new_zeros(valid.shape[0], tail)], dim=1)[:, None, None, :].to(local.device)
        return local & ~hidden if local.dtype == torch.bool else local.masked_fill(hidden, _lowest(local.dtype))
    if valid is None:
        return None
    allowed = torch.cat([valid, valid.new_ones(valid.shape[0], tail)], dim=1)[:, None, None, :]
    allowed = allowed.expand(-1, 1, queries, -1).to(like.device)
    return _as_additive(allowed, like.dtype) if additive else allowed


def _tail(mask: Tensor, layout: Layout) -> Tensor:
    tail = mask[..., layout.length :]
    return tail.expand(layout.index.shape[0], *tail.shape[1:])


def _closed(local: Tensor, layout: Layout, additive: bool, dtype: torch.dtype) -> Tensor:
    """Hide invalid slots from all but themselves: a row that may attend to nothing would become NaN and spread."""
    valid = layout.valid
    if valid is None:
        return local
    valid = valid.to(local.device)
    itself = torch.eye(layout.width, dtype=torch.bool, device=local.device)
    hidden = ~valid[:, None, None, :] & ~itself
    own = ~valid[:, None, :, None] & itself
    if local.dtype == torch.bool:
        allowed = (local & ~hidden) | own
        return _as_additive(allowed, dtype) if additive else allowed
    return local.masked_fill(hidden, _lowest(local.dtype)).masked_fill(own, 0.0)


def _as_additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, _lowest(dtype))


def _lowest(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).min
