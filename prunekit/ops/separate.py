"""Clustering by density with a cutoff: no two centres are near each other, and every token is near a centre (DBDPC)."""

from __future__ import annotations

import torch
from torch import Tensor

from prunekit.ops.nearest import nearest_kept
from prunekit.ops.scale import precise
from prunekit.ops.topk import ranks

SCALE = 2.0  # of distances in the density, the authors' constant


@torch.no_grad()
def density_cutoff(
    distance: Tensor, cutoff: float, reach: float = 1.0, core: Tensor | None = None, valid: Tensor | None = None
) -> Tensor:
    """The centre of the cluster that each token belongs to: owner, int64 (B, V); centres own themselves.

    distance: float (B, V, V), symmetric; that of a token to itself counts as 0, one below 0 as 0. core: bool (B, V),
    the tokens that may be centres and make up the density, sum of exp(-(distance / 2)^2); None: all. From the densest
    core token on (ties: lower index), each is a centre unless a centre lies within `cutoff`. Every token joins the
    nearest centre (ties: lower index) if it lies within `reach` times `cutoff`; -1 for the others, and for padding.
    Waits for the device once in each round; a round settles all tokens without an open denser neighbour.

    Source: PACT (https://arxiv.org/abs/2504.08966, orailix/PACT@cf9a0c9), whose rounds give the same centres.
    """
    present = torch.ones(distance.shape[:-1], dtype=torch.bool, device=distance.device) if valid is None else valid
    core = present if core is None else core & present
    itself = torch.eye(distance.shape[-1], dtype=torch.bool, device=distance.device)
    distance = precise(distance).nan_to_num(nan=torch.inf).clamp(min=0.0).masked_fill(itself, 0.0)
    # Sorted, so that the same distances in another order have the same sum.
    around = distance.masked_fill(~core.unsqueeze(-2), torch.inf).sort(dim=-1).values.double()
    rank = ranks((-(around / SCALE).square()).exp().sum(-1), core)
    near = (distance <= cutoff) & core.unsqueeze(-1) & core.unsqueeze(-2)
    denser = near & (rank.unsqueeze(-2) < rank.unsqueeze(-1))
    centres, still = torch.zeros_like(core), core
    while bool(still.any()):
        found = still & ~(denser & still.unsqueeze(-2)).any(-1)
        centres = centres | found
        still = still & ~(near & found.unsqueeze(-2)).any(-1)
    owner = nearest_kept(-distance, centres, present)
    away = distance.gather(-1, owner.clamp(min=0).unsqueeze(-1)).squeeze(-1) > reach * cutoff
    return owner.masked_fill(away & ~centres, -1)
