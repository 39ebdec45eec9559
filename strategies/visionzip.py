"""VisionZip (https://arxiv.org/abs/2412.04467, CVPR 2025): dominant visual tokens, and a few that sum up the rest.

Rule, for each crop or frame with T tokens to keep, C = round(contextual * T) of them contextual: dominant are the CLS
token itself and the T - C - 1 patches with the largest sum over heads of the CLS attention. Of the other R patches in
raster order every floor(R / C)-th, beginning with the first, is a target, C together; the rest go to the target t with
the largest cosine of keys (mean over heads), and t becomes x_t + mean of those that came to it. Attention and keys are
of the tower block whose output the projector gets. (54, 10), (108, 20) and (162, 30) are `contextual: 0.15625`.

Studied: dvlab-research/VisionZip@3151f6d. Deviations: tokens keep raster order and positions, CLS takes the place of
the first patch of its crop that would go, and targets stay where they are; the authors put CLS first and contextual
tokens last; a crop that keeps all of its patches gets no CLS. `keep` is of a sample and is shared between its crops in
proportion to their tokens, newlines last. As theirs, merged tokens and CLS go through the projector afterwards; behind
a stage that merges they are of the tower's features all the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from prunekit import EncoderRows, Features, ModelShape, Selection, Sites, hookimpl, strategy
from prunekit.ops import cosine, crop_quotas, group_members, nearest_kept, precise, slot_weights, top_k_mask


@strategy(
    paper="2412.04467",
    code="dvlab-research/VisionZip@3151f6d",
    sites=Sites(decoder=False),
    inputs={"encoder_attention": EncoderRows(heads="sum"), "features": (Features(), Features(of="cls"))},
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
        features: tuple[Tensor, Tensor],
        coords: Tensor,
        frames: Tensor,
        cls_crops: Tensor,
        project: Callable[[Tensor], Tensor],
        count: int,
    ) -> Selection:
        """Exactly `count` tokens; contextual ones and CLS are extras, float (E, H), in their slots."""
        groups, quota = crop_quotas(coords, frames, count)
        owner, patches, cls = torch.full_like(groups, -1), *features
        crops = {crop: number for number, crop in enumerate(map(tuple, cls_crops.tolist()))} if self.cls else {}
        slots = {}
        for tokens, share in zip(group_members(groups, len(quota)), quota.tolist(), strict=True):
            image, row, frame = (int(x) for x in (*coords[tokens[0], :2], frames[tokens[0]]))
            extra = crops.get((image, frame)) if row >= 0 and 0 < share < len(tokens) else None
            merged = 0 if row < 0 or not share else min(math.floor(self.contextual * share + 0.5 + 1e-9), share - 1)
            dominant = top_k_mask(encoder_attention[tokens], share - merged - (extra is not None))
            owner[tokens[dominant]], rest = tokens[dominant], tokens[~dominant]
            if merged:
                owner[rest] = rest[self._targets(encoder_keys[rest], merged)]
            if extra is not None:
                slots[extra] = int(rest[owner[rest] != rest][0])
        contextual, states = self._merged(owner, patches)
        made = torch.cat([states, cls[list(slots)].to(states)])
        taken = torch.tensor([*contextual.tolist(), *slots.values()], dtype=torch.int64, device=owner.device)
        keep = (owner == torch.arange(len(owner), device=owner.device)).index_fill(0, taken, True)
        return Selection(keep, slot_weights(taken, len(keep)), extras=project(made.to(patches)))

    @staticmethod
    def _targets(keys: Tensor, count: int) -> Tensor:
        """For each of R tokens the one that it joins: int64 (R,)."""
        place = torch.arange(len(keys), device=keys.device)
        step = max(len(keys) // count, 1)
        return nearest_kept(cosine(keys), (place % step == 0) & (place < step * count))

    def _merged(self, owner: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        """The targets that others joined, int64 (C,), and what becomes of them in front of the projector, (C, W)."""
        states = precise(patches)
        joins = (owner >= 0) & (owner != torch.arange(len(owner), device=owner.device))
        number = torch.zeros_like(states[:, 0]).index_add_(0, owner[joins], torch.ones_like(states[joins, 0]))
        others = torch.zeros_like(states).index_add_(0, owner[joins], states[joins])
        contextual = number.nonzero()[:, 0]
        states, others, number = states[contextual], others[contextual], number[contextual, None]
        return contextual, states + others / number if self.merge == "add" else (states + others) / (1 + number)

    @hookimpl
    def flops(self, shape: ModelShape, text: int, visual: int) -> int:
        """One row of attention, cosines of keys within each crop, and the merge; not what the projector does again."""
        if shape.tower is None:
            return 0
        crop = min(visual, shape.visual_tokens or visual)
        return 2 * visual * (shape.tower.width * (1 + crop) + shape.hidden * visual)
