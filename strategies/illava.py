"""iLLaVA (https://arxiv.org/abs/2412.06263): the least attended tokens become one, in the tower and in the decoder.

Of n tokens, r = n - count leave: the r + 1 that receive least become sum_j w_j x_j, w_j = j / sum of 1 ... r + 1, j = r
+ 1 for the least attended, in the place of the most attended of them. In blocks 5 to 8 of the tower, between attention
and MLP, what a token receives is the column mean of the head-mean attention; before decoder layer 8 (of 28) it is the
row of the last prompt token in the layer before, head mean.

Rule: hulianyuyy/iLLaVA@4068149 with the settings for images of LLaVA-OneVision: 92 of 729 tokens a block, then 0.7 of
what is left. That the least attended weigh most is what the code does; its comments say the opposite, which is `ramp:
reversed`. Deviations: blocks scale with the depth (of 26 that make the features); crops merge by themselves, each to
its share of the count, and one without a share is dropped; sizes are not counted, as in theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from prunekit import EncoderRows, ModelShape, Owners, Rows, Selection, Site, Sites, hookimpl, strategy
from prunekit.ops import crop_quotas, group_members, precise, ranks

Ramp = Literal["official", "reversed"]
BLOCKS, OF = (5, 6, 7, 8), 26
LEAVE, TOKENS = 92, 729


def _blocks(self: ILLaVA, layers: int, blocks: int) -> Mapping[Site, float]:
    """92 of 729 tokens leave in each of the four blocks."""
    sites = [Site(blocks * block // OF, "vision", "mid") for block in BLOCKS]
    return {site: 1 - LEAVE * (number + 1) / TOKENS for number, site in enumerate(sites)}


def _fused(attention: Tensor, count: int, ramp: Ramp) -> tuple[Tensor, Tensor]:
    """Owners, int64 (V,), and amounts, float (V,): `count` tokens stay, the last of them with all others fused in."""
    place = ranks(attention)
    behind = place - (count - 1)  # 0 for the most attended of those that become one
    fused = (behind >= 0) & (len(place) > count)
    step = len(place) - count + 1
    weight = behind + 1 if ramp == "official" else step - behind
    amounts = torch.where(fused, weight / (step * (step + 1) / 2), 1.0)
    return torch.where(fused, place.argsort()[count - 1], torch.arange(len(place), device=place.device)), amounts


def _selection(owner: Tensor, amounts: Tensor) -> Selection:
    return Selection(owner == torch.arange(len(owner), device=owner.device), Owners(owner, "sum", amounts))


@strategy(
    paper="2412.06263",
    code="hulianyuyy/iLLaVA@4068149",
    sites=Sites(default=Site(0, "vision", "mid"), tower=True, encoder=False, decoder=False),
    inputs={"encoder_attention": EncoderRows(query="mean")},
    schedule=_blocks,
    spread=True,
    per_sample=True,
)
class ILLaVA:
    """Inside the tower, fuse the tokens that receive least attention into one, block by block.

    ramp: who weighs most: `official`, the least attended, as the authors' code does; `reversed`, as its comments say.
    """

    ramp: Ramp = "official"

    @hookimpl
    def select_tokens(self, encoder_attention: Tensor, coords: Tensor, frames: Tensor, count: int) -> Selection:
        """Bool (V,), owners and amounts from what each token receives, float (V,)."""
        received = precise(encoder_attention)
        groups, quota = crop_quotas(coords, frames, count)
        owner, amounts = torch.full_like(groups, -1), torch.ones_like(received)
        for tokens, share in zip(group_members(groups, len(quota)), quota.tolist(), strict=True):
            if share:
                mine, weights = _fused(received[tokens], share, self.ramp)
                owner[tokens], amounts[tokens] = tokens[mine], weights.to(amounts)
        return _selection(owner, amounts)

    @hookimpl
    def flops(self, shape: ModelShape, text: int, visual: int) -> int:
        """The attention map of one block, within each crop."""
        width, crop = shape.tower.width if shape.tower else 0, min(visual, shape.visual_tokens or visual)
        return 2 * visual * crop * width


@strategy(
    paper="2412.06263",
    code="hulianyuyy/iLLaVA@4068149",
    sites=Sites(default=lambda layers: Site(max(layers * 2 // 7, 1)), encoder=False, lowest=1),
    inputs={"attention": Rows(layer="previous")},
    per_sample=True,
)
class ILLaVADecoder:
    """Fuse the visual tokens to which the last prompt token attends least in the layer before into one.

    ramp: as for the tower.
    """

    ramp: Ramp = "official"

    @hookimpl
    def select_tokens(self, attention: Tensor, count: int) -> Selection:
        """Bool (V,), owners and amounts from attention, float (V,)."""
        return _selection(*_fused(precise(attention), count, self.ramp))

    @hookimpl
    def flops(self, shape: ModelShape, text: int, visual: int) -> int:
        """One row."""
        return shape.row_flops(1, text + visual)
