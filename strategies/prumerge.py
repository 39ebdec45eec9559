"""LLaVA-PruMerge and PruMerge+ (https://arxiv.org/abs/2403.15388, ICCV 2025): outliers of CLS attention, and merges.

Rule, for each crop or frame: a = the CLS row of softmax(q k^T / sqrt(W)) in the last tower block, all heads as one of
width W, CLS among the keys and not normalised again. Kept are the tokens with a > Q3 + 1.5 (Q3 - Q1); each becomes x_i
+ sum of a_j x_j over its 32 nearest other tokens by the cosine of keys, kept ones among them, all x unmerged. One more
token is the sum of a_j x_j over all dropped ones. "+": of n tokens, T of them outliers, also those at 0, s, 2 s, ...
below N - 1 in raster order are kept, s = floor(floor(n / T) / 3).

Studied: 42Shawn/LLaVA-PruMerge@097c041. Deviations: tokens keep raster order and positions, the merged token stands in
the place of the last dropped one; outliers are counted in each crop, at least one; s is at least 1, where the authors'
code fails above a third. With a budget (the authors have a fixed ratio for PruMerge alone) a crop keeps exactly its
share: the highest a and the merged token, in "+" a quarter of them by a and the others at even distances, about as many
as the rule has.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from prunekit import EncoderKeys, EncoderRows, ModelShape, Selection, Sites, hookimpl, strategy
from prunekit.ops import cosine, crop_quotas, group_members, outliers, precise, slot_weights, top_k_mask


@strategy(
    paper="2403.15388",
    code="42Shawn/LLaVA-PruMerge@097c041",
    sites=Sites(decoder=False),
    inputs={
        "encoder_attention": EncoderRows(layer=-1, heads="joined"),
        "encoder_keys": EncoderKeys(layer=-1, heads="none"),
    },
    keep="optional",
    per_sample=True,
)
class PruMerge:
    """Keep the tokens that CLS attends to far more than to the others, and merge what is near into them.

    neighbours: how many other tokens are added to each kept one.
    """

    neighbours: int = 32

    @hookimpl
    def select_tokens(
        self,
        encoder_attention: Tensor,
        encoder_keys: Tensor,
        features: Tensor,
        coords: Tensor,
        frames: Tensor,
        project: Callable[[Tensor], Tensor],
        count: int | None,
    ) -> Selection:
        """`count` tokens, or as many as there are outliers and merged ones; merged ones are extras, float (E, H)."""
        groups, quota = crop_quotas(coords, frames, len(coords) if count is None else count)
        keep, merged = torch.zeros_like(groups, dtype=torch.bool), torch.zeros_like(groups, dtype=torch.bool)
        states = precise(features).clone()
        for tokens, share in zip(group_members(groups, len(quota)), quota.tolist(), strict=True):
            separates = bool(coords[tokens[0], 1] < 0)
            if (count is None and separates) or not share:
                continue
            if count is not None and (separates or share == len(tokens)):
                keep[tokens[:share]] = True
                continue
            attention = encoder_attention[tokens].to(states.dtype)
            chosen = self._chosen(attention, coords[tokens], None if count is None else share - 1)
            weights = self._added(attention, encoder_keys[tokens].flatten(1), chosen)
            if len(dropped := (~chosen).nonzero()[:, 0]):
                chosen[dropped[-1]] = True
                weights[dropped[-1]] = 0
                weights[dropped[-1], dropped] = attention[dropped]
            keep[tokens[chosen]] = merged[tokens[chosen]] = True
            states[tokens] = weights @ states[tokens]
        slots = merged.nonzero()[:, 0]
        return Selection(keep, slot_weights(slots, len(keep)), extras=project(states[slots].to(features)))

    def _added(self, attention: Tensor, keys: Tensor, chosen: Tensor) -> Tensor:
        """float (n, n): each token of a crop, and in kept ones their nearest others times their attention."""
        itself = torch.eye(len(keys), dtype=torch.bool, device=keys.device)
        near = top_k_mask(cosine(keys), self.neighbours, ~itself) & chosen[:, None]
        return itself + near * attention

    def _chosen(self, attention: Tensor, coords: Tensor, count: int | None) -> Tensor:
        """Bool (n,), the tokens of one crop that stay beside the merged one."""
        return top_k_mask(attention, _outliers(attention) if count is None else count)

    @hookimpl
    def flops(self, shape: ModelShape, text: int, visual: int) -> int:
        """One row of attention, cosines of keys within each crop, and merges; not what the projector does again."""
        width, crop = shape.tower.width if shape.tower else 0, min(visual, shape.visual_tokens or visual)
        return 2 * visual * (width * (1 + 2 * crop) + shape.hidden * visual)


@strategy()
class PruMergePlus(PruMerge):
    """PruMerge, and an even grid beside the outliers.

    neighbours: how many other tokens are added to each kept one.
    """

    def _chosen(self, attention: Tensor, coords: Tensor, count: int | None) -> Tensor:
        if count is None:
            outlying = _outliers(attention)
            step = max(len(attention) // outlying // 3, 1)
            place, last = coords[:, 1] * coords[:, 4] + coords[:, 2], coords[:, 3] * coords[:, 4] - 1
            return top_k_mask(attention, outlying) | ((place % step == 0) & (place < last))
        chosen = top_k_mask(attention, -(-count // 4))
        rest = (~chosen).nonzero()[:, 0]
        spread = count - -(-count // 4)
        even = (2 * torch.arange(spread, device=rest.device) + 1) * len(rest) // (2 * max(spread, 1))
        return chosen.index_fill(0, rest[even], True)


def _outliers(attention: Tensor) -> int:
    """How many of one crop's tokens are outliers, at least one."""
    return max(int(outliers(attention).sum()), 1)
