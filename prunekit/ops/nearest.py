"""Assigning dropped tokens to the nearest kept one."""

from __future__ import annotations

import torch
from torch import Tensor

from prunekit.ops.topk import sortable


@torch.no_grad()
def nearest_kept(similarity: Tensor, keep: Tensor, valid: Tensor | None = None) -> Tensor:
    """The kept token that each token joins: owner, int64 (B, V).

    similarity: float (B, V, V), of token i with token j; for distances pass their negative. keep: bool (B, V). A
    dropped token joins the kept one that it is most similar to (ties: lower index), a kept one itself. -1 for padding,
    and for every token of a row that keeps none.

    Source: VScan (https://arxiv.org/abs/2505.22654, Tencent/SelfEvolvingAgent@a82450e).
    """
    keep = keep if valid is None else keep & valid
    nearest = sortable(similarity).masked_fill(~keep.unsqueeze(-2), -torch.inf).argmax(-1)
    itself = torch.arange(keep.shape[-1], device=keep.device).expand_as(nearest)
    joins = keep.any(-1, keepdim=True)
    return torch.where(keep, itself, nearest).masked_fill(~(joins if valid is None else joins & valid), -1)
