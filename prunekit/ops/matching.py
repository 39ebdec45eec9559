"""Bipartite soft matching: merge the most similar pairs of tokens without a loop (ToMe)."""

from __future__ import annotations

import torch
from torch import Tensor

from prunekit.ops.topk import Counts, per_row, sortable, top_k_mask


@torch.no_grad()
def bipartite_matching(
    similarity: Tensor,
    merges: Counts,
    sources: Tensor | None = None,
    valid: Tensor | None = None,
    protected: Tensor | None = None,
) -> Tensor:
    """The kept token that each token joins: owner, int64 (B, V).

    Tokens are split into sources and targets; each source proposes the target that it is most similar to, and the
    `merges` strongest proposals are carried out. Several sources may join one target. All other tokens stay.

    similarity: float (B, V, V), of source i with target j. merges: how many tokens go, one number or one for each row.
    sources: bool (B, V), True at sources; None: every second valid token, beginning with the first, and at most half of
    the tokens that are not protected go. valid: bool (B, V). protected: bool (B, V), tokens that neither join nor are
    joined, as a CLS token; they take part in counting every second. Ties: lower index, of targets as of sources.
    -1 for padding.

    Source: ToMe (https://arxiv.org/abs/2210.09461, facebookresearch/ToMe@af95e4b), whose similarity is the cosine of
    the keys' mean over heads; with `sources` from a ranking TokenCarve (https://arxiv.org/abs/2503.10501).
    """
    present = torch.ones_like(similarity[..., 0], dtype=torch.bool) if valid is None else valid
    free = present if protected is None else present & ~protected
    limit = per_row(merges, similarity.device)
    if sources is None:
        sources = present.cumsum(-1) % 2 == 1
        limit = limit.minimum(free.sum(-1, keepdim=True) // 2)
    targets = free & ~sources
    best, target = sortable(similarity).masked_fill(~targets.unsqueeze(-2), -torch.inf).max(-1)
    can_join = free & sources & targets.any(-1, keepdim=True)
    joins = top_k_mask(best, limit.squeeze(-1), can_join)
    itself = torch.arange(present.shape[-1], device=present.device).expand_as(target)
    return torch.where(joins, target, itself).masked_fill(~present, -1)
