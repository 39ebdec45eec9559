"""Logical attention masks to physical ones.

transformers makes one mask for the complete sequence; a layer that runs on fewer tokens, or attends to fewer cached
ones, needs the matching rows and columns of it. Masks come in three kinds: `bool` (B|1, 1, Q, K) for sdpa, `additive`
of the same shape for eager, and `flat`, the 2-D padding mask (B, K) of the flash kernels. None is plain causal.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from prunekit.engine.tokens.layout import Layout
from prunekit.errors import Unsupported

Kind = Literal["bool", "additive", "flat"]


def kind_of(implementation: str) -> Kind | None:
    """The kind of mask that an attention implementation takes; None for one that prunekit does not know."""
    if implementation in ("sdpa", "eager"):
        return "bool" if implementation == "sdpa" else "additive"
    return "flat" if "flash" in implementation else None


def prefill_mask(mask: Tensor | None, queries: Layout, keys: Layout, like: Tensor, kind: Kind) -> Tensor | None:
    """The mask for a prefill in which the slots of `queries` attend to the slots of `keys`.

    mask: the logical one, with S rows and columns. like: a tensor with the device and dtype of the queries.
    Queries that are fillings see everything: a row that may attend to nothing would become NaN and spread.
    """
    if kind == "flat":
        return _flat(mask, queries, keys)
    same = queries is keys
    if mask is None and same and keys.valid is None and keys.sizes is None:
        return None
    if mask is None:
        local = queries.index[:, None, :, None] >= keys.index[:, None, None, :]
    else:
        local = queries.gather(keys.gather(mask, dim=3), dim=2)
    if keys.valid is not None:
        local = _hide(local, ~keys.valid[:, None, None, :])
    if queries.valid is not None:
        local = _show(local, ~queries.valid[:, None, :, None])
    return _finished(local.to(like.device), keys.sizes, 0, like, kind)


def decode_mask(
    mask: Tensor | None, layout: Layout, tail: int, queries: int, like: Tensor, kind: Kind
) -> Tensor | None:
    """The mask for `queries` new tokens on a cache that holds the slots of `layout` and, after them, `tail` later
    tokens, the new ones among them.

    mask: None (the new tokens see everything) or the logical one, whose last dimension is S + tail or, for a cache of
    fixed size, longer.
    """
    valid = layout.valid
    if mask is not None:
        dim = mask.ndim - 1
        rest = mask[..., layout.length :]
        local = torch.cat(
            [layout.gather(mask[..., : layout.length], dim), rest.expand(len(layout.index), *rest.shape[1:])], dim
        )
    elif valid is None and layout.sizes is None:
        return None
    else:
        local = torch.ones(len(layout.index), layout.width + tail, dtype=torch.bool, device=like.device)
        local = local if kind == "flat" else local[:, None, None, :].expand(-1, 1, queries, -1)
    if valid is not None:
        filled = valid.new_zeros(len(valid), local.shape[-1] - layout.width)
        hidden = torch.cat([~valid, filled], dim=1).to(local.device)
        local = _hide(local, hidden if local.ndim == 2 else hidden[:, None, None, :])
    return local if kind == "flat" else _finished(local, layout.sizes, local.shape[-1] - layout.width, like, kind)


def bidirectional_mask(mask: Tensor | None, layout: Layout, like: Tensor, kind: Kind) -> Tensor | None:
    """The mask for slots of `layout` that all attend to each other, as in the blocks of a vision tower.

    mask: None, or the logical one, (B|1, 1, 1 or S, S). like: a tensor with the device and dtype of the queries.
    Queries of which nothing visible remains, such as padding of a crop, see all tokens of their row: a query that may
    attend to nothing would become NaN and spread. They do not see fillings, of which a row has as many as the other
    rows make necessary; only in a row without any token, whose states nobody reads, fillings see each other.
    """
    if mask is None and layout.valid is None and layout.sizes is None:
        return None
    if mask is None:
        local = layout.present[:, None, None, :]
    else:
        local = layout.gather(mask, dim=3)
        local = local if mask.shape[2] == 1 else layout.gather(local, dim=2)
        local = local if layout.valid is None else _hide(local, ~layout.valid[:, None, None, :])
    present = layout.present[:, None, None, :]
    shown = present | ~present.any(-1, keepdim=True)
    local = _show(local, ~visible(local).any(-1, keepdim=True) & shown.to(local.device))
    return _finished(local.to(like.device), layout.sizes, 0, like, kind)


def visible(mask: Tensor) -> Tensor:
    """A mask, bool or additive, as bool: additive ones hide with the lowest number of some dtype, or with -inf."""
    return mask if _is_bool(mask) else mask > max(torch.finfo(mask.dtype).min / 2, -1e30)


def _flat(mask: Tensor | None, queries: Layout, keys: Layout) -> Tensor | None:
    if queries is not keys:
        raise Unsupported("frozen visual tokens need a mask that flash kernels do not take; use sdpa or eager")
    if keys.valid is None and mask is None:
        return None
    present = keys.present if mask is None else keys.gather(mask).to(torch.bool) & keys.present
    return present if mask is None else present.to(mask.dtype)


def _finished(local: Tensor, sizes: Tensor | None, tail: int, like: Tensor, kind: Kind) -> Tensor:
    """`local` in the kind that attention takes, with log(size) added to the keys' logits."""
    if sizes is not None:
        wide = torch.promote_types(sizes.dtype, like.dtype)
        bias = sizes.to(local.device, wide).log().to(like.dtype)
        bias = torch.cat([bias, bias.new_zeros(len(bias), tail)], dim=1)[:, None, None, :]
        return bias.expand(local.shape).masked_fill(~local, _lowest(like.dtype)) if _is_bool(local) else local + bias
    if _is_bool(local) and kind == "additive":
        return torch.zeros(local.shape, dtype=like.dtype, device=local.device).masked_fill(~local, _lowest(like.dtype))
    return local


def _hide(local: Tensor, where: Tensor) -> Tensor:
    where = where.to(local.device)
    if _is_bool(local):
        return local & ~where
    return local.masked_fill(where, 0 if not local.is_floating_point() else _lowest(local.dtype))


def _show(local: Tensor, where: Tensor) -> Tensor:
    where = where.to(local.device)
    return local | where if _is_bool(local) else local.masked_fill(where, 0.0)


def _is_bool(local: Tensor) -> bool:
    return local.dtype == torch.bool


def _lowest(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).min
