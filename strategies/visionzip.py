"""VisionZip (https://arxiv.org/abs/2412.04467, CVPR 2025): dominant visual tokens, and a few that sum up the rest.

Rule, for each crop or frame with T tokens to keep, C = round(contextual * T) of them contextual: dominant are the CLS
token itself and the T - C - 1 patches with the largest sum over heads of the CLS attention. Of the other R patches in
raster order every floor(R / C)-th, beginning with the first, is a target, C together; the rest go to the target t with
the largest cosine of keys (mean over heads), and t becomes x_t + mean of those that came to it. Attention and keys are
of the tower block whose output the projector gets. (54, 10), (108, 20) and (162, 30) are `contextual: 0.15625`.

Studied: dvlab-research/VisionZip@3151f6d. Deviations: the authors merge in front of the projector, which is not linear,
and here projected features are merged; `cls: false` at the tower block whose output the projector gets (`at: vision.22`
on LLaVA-1.5) merges where they do, without the CLS token. Tokens keep raster order and positions, CLS takes the place
of the first patch of its crop that would go, and targets stay where they are; the authors put CLS first and contextual
tokens last. `keep` is of a sample and is shared between its crops in proportion to their tokens, newlines last.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from prunekit import EncoderRows, ModelShape, Owners, Selection, Sites, hookimpl, strategy
from prunekit.ops import cosine, crop_quotas, group_members, nearest_kept, top_k_mask


@strategy(
    sites=lambda self: Sites(tower=not self.cls, decoder=False),
    inputs={"encoder_attention": EncoderRows(heads="sum")},
    extras=lambda self: ("cls",) if self.cls else (),
    per_sample=True,
)
class VisionZip:
    """Keep what the CLS token attends to, CLS itself, and a few tokens into which the rest is merged.

    contextual: the part of the tokens to keep that are merged. cls: the CLS token goes in, as one of the tokens to keep
    of each crop. merge: how: `add` adds the mean of the others to a target, as the authors do; `mean` averages them.
    """

    contextual: float = 0.15625
    cls: bool = True
    merge: Literal["add", "mean"] = "add"

    def __post_init__(self) -> None:
        if not 0 <= self.contextual < 1:
            raise ValueError("contextual: is a part, from 0 to less than 1")

    @hookimpl
    def select_tokens(
        self,
        encoder_attention: Tensor,
        encoder_keys: Tensor,
        coords: Tensor,
        frames: Tensor,
        extras_crops: Tensor,
        count: int,
    ) -> Selection:
        """Exactly `count` tokens, with who joins whom, or with the weights (V, V + E) where CLS goes in."""
        groups, quota = crop_quotas(coords, frames, count)
        owner = torch.full_like(groups, -1)
        crops = {crop: number for number, crop in enumerate(map(tuple, extras_crops.tolist()))}
        taken = {}
        for tokens, share in zip(group_members(groups, len(quota)), quota.tolist(), strict=True):
            image, row, frame = (int(x) for x in (*coords[tokens[0], :2], frames[tokens[0]]))
            extra = crops.get((image, frame)) if row >= 0 else None
            merged = 0 if row < 0 or not share else min(math.floor(self.contextual * share + 0.5 + 1e-9), share - 1)
            alone = share - merged - (extra is not None and share > 0)
            dominant = top_k_mask(encoder_attention[tokens], alone)
            owner[tokens[dominant]], rest = tokens[dominant], tokens[~dominant]
            if merged:
                owner[rest] = rest[self._targets(encoder_keys[rest], merged)]
            if extra is not None and share:
                taken[extra] = rest[owner[rest] != rest][0]
        return self._selection(owner, taken, len(crops), encoder_attention.dtype)

    @staticmethod
    def _targets(keys: Tensor, count: int) -> Tensor:
        """For each of R tokens the one that it joins: int64 (R,)."""
        place = torch.arange(len(keys), device=keys.device)
        step = max(len(keys) // count, 1)
        return nearest_kept(cosine(keys), (place % step == 0) & (place < step * count))

    def _selection(self, owner: Tensor, taken: dict[int, Tensor], extras: int, dtype: torch.dtype) -> Selection:
        """taken: the slot of each extra that goes in."""
        itself, target = torch.arange(len(owner), device=owner.device), owner.clamp(min=0)
        keep, joins = owner == itself, (owner >= 0) & (owner != itself)
        joined = torch.zeros(len(owner), dtype=dtype, device=owner.device).index_add_(0, target, joins.to(dtype))[
            target
        ]
        amounts = torch.where(joins, 1 / joined, 1.0) if self.merge == "add" else 1 / (1 + joined)
        if not self.cls:
            return Selection(keep, Owners(owner, "sum", amounts))
        weights = torch.zeros(len(owner), len(owner) + extras, dtype=dtype, device=owner.device)
        weights[target, itself] = torch.where(owner >= 0, amounts, 0.0)
        for extra, slot in taken.items():
            weights[slot] = 0
            weights[slot, len(owner) + extra] = 1
            keep[slot] = True
        return Selection(keep, weights)

    @hookimpl
    def flops(self, shape: ModelShape, text: int, visual: int) -> int:
        """One row of attention, cosines of keys within each crop, and the merge where it is a matrix."""
        if shape.tower is None:
            return 0
        crop = min(visual, shape.visual_tokens or visual)
        return 2 * visual * (shape.tower.width * (1 + crop) + shape.hidden * visual * self.cls)
