"""Clustering by density peaks with nearest neighbours (DPC-KNN)."""

from __future__ import annotations

import torch
from torch import Tensor

from prunekit.ops.nearest import nearest_kept
from prunekit.ops.scale import precise
from prunekit.ops.topk import Counts, ranks, top_k_mask


@torch.no_grad()
def density_peaks(distance: Tensor, count: Counts, neighbours: int, valid: Tensor | None = None) -> Tensor:
    """The centre of the cluster that each token belongs to: owner, int64 (B, V); centres own themselves.

    distance: float (B, V, V), symmetric, 0 of a token to itself. The density of a token is exp(-mean of the squared
    distances to its `neighbours` nearest tokens, itself the first of them), or to all where a row has fewer. Its
    separation is the distance to the nearest denser token; of equally dense ones the lower index counts as denser,
    which takes the place of the random noise of published code. Centres are the densest token, whose separation is
    defined as the largest of all, and the others with the largest product of both (ties: lower index), `count`
    together. Every other token joins the nearest centre.

    Source: Du, Ding, Jia 2016 (https://doi.org/10.1016/j.knosys.2016.02.001), with the token itself among its
    neighbours as in SparseVLM (https://arxiv.org/abs/2410.04417, Gumpest/SparseVLMs@26a5f48), which passes Euclidean
    distances divided by sqrt(H).
    """
    distance = precise(distance).nan_to_num(nan=torch.inf)
    tokens = distance.shape[-1]
    present = torch.ones(distance.shape[:-1], dtype=torch.bool, device=distance.device) if valid is None else valid
    pairs = present.unsqueeze(-1) & present.unsqueeze(-2)
    # Logarithms order the products as they are, and do not vanish where tokens are far apart.
    log_density = _log_density(distance.masked_fill(~pairs, torch.inf), min(neighbours, tokens), present)
    rank = ranks(log_density, present)
    denser = pairs & (rank.unsqueeze(-2) < rank.unsqueeze(-1))
    separation = distance.masked_fill(~denser, torch.inf).amin(-1)
    centres = top_k_mask(log_density + separation.log(), count, present)
    return nearest_kept(-distance, centres, valid)


@torch.no_grad()
def recycle(scores: Tensor, states: Tensor, kept: int, recycled: int, clusters: int) -> Tensor:
    """The tokens of one sample that stay, and the best of the others in clusters: owner, int64 (V,).

    scores: float (V,), states: float (V, H). The `kept` best (ties: lower index) own themselves; the `recycled` best of
    the others are put into `clusters` clusters by `density_peaks`, with as many neighbours, over Euclidean distances
    divided by sqrt(H); -1 for the rest.

    Source: SparseVLM (https://arxiv.org/abs/2410.04417, Gumpest/SparseVLMs@26a5f48).
    """
    order = ranks(scores).argsort()
    owner = torch.full_like(order, -1)
    owner[order[:kept]] = order[:kept]
    if clusters:
        others = order[kept : kept + recycled]
        chosen = precise(states[others])
        distance = torch.cdist(chosen, chosen, compute_mode="donot_use_mm_for_euclid_dist")
        owner[others] = others[density_peaks(distance / states.shape[-1] ** 0.5, clusters, clusters)]
    return owner


def _log_density(distance: Tensor, neighbours: int, present: Tensor) -> Tensor:
    """float (B, V); distances to padding are infinite and are left out of the mean."""
    near = distance.topk(neighbours, dim=-1, largest=False).values
    used = present.sum(-1, keepdim=True).clamp(max=neighbours)
    squares = near.square().masked_fill(torch.arange(neighbours, device=near.device) >= used.unsqueeze(-1), 0.0)
    return -squares.sum(-1) / used
