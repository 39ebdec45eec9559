"""FlowCut (https://arxiv.org/abs/2505.19536): the tower prunes itself, block by block, by what flows to CLS.

Rule: TungChintao/FlowCut@a2ecd24. Behind every block l of the tower, of the n patches of a crop: a is the attention of
CLS, the mean over heads; b the softmax of value_CLS . value_i over all tokens with CLS, head by head and unscaled, then
the mean; both divided by their sums over the patches. The score s = (a + b) * |mean of the heads' values|_1 updates a
running score R <- (R + s) / 2, at first R = s. With L the last block that prunes, every second block, counted back from
L, drops round((n - T) / sqrt(L - l) * (1 - (H / ln n)^2)) of the lowest R, H the entropy of a, but never leaves less
than T; L leaves T. Blocks are 0 to the last but one before the image features: L = 21 of LLaVA-1.5.
Deviations: T is a crop's share of the count, in proportion to its grid and exactly; the authors take one number for
each of several crops from the largest of them, and prune them a second time inside the decoder, which is a stage of its
own here. Entropy is of each crop alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from prunekit import EncoderRows, EncoderValues, ModelShape, Site, Sites, hookimpl, strategy
from prunekit.ops import group_sizes, group_top_k, precise, quotas


def _every_block(self: FlowCut, layers: int, blocks: int) -> Mapping[Site, float]:
    return {Site(block, "vision", "after"): 1 / 3 for block in range(max(blocks - 1, 1))}


@strategy(
    paper="2505.19536",
    code="TungChintao/FlowCut@a2ecd24",
    sites=Sites(default=Site(0, "vision", "after"), tower=True, encoder=False, decoder=False),
    inputs={
        "encoder_attention": EncoderRows(),
        "encoder_values": (EncoderValues(heads="none"), EncoderValues(heads="none", of="cls")),
    },
    schedule=_every_block,
    per_sample=True,
)
class FlowCut:
    """Inside the tower, drop what CLS takes least from, more where its attention is concentrated; a third is left.

    `keep` is what the last of the sites leaves. Sites at an odd distance from it keep all and only score.
    """

    @hookimpl
    def select_tokens(
        self,
        encoder_attention: Tensor,
        encoder_values: tuple[Tensor, Tensor],
        coords: Tensor,
        frames: Tensor,
        index: Tensor,
        sites: tuple[Site, ...],
        cut: int,
        state: dict[str, Any],
        count: int,
    ) -> Tensor:
        """Bool (V,) from attention, float (V,), and values of patches and of CLS, float (V, A, D) and (E, A, D)."""
        values, cls = map(precise, encoder_values)
        running, flow = torch.zeros_like(values[:, 0, 0]), precise(encoder_attention).clone()
        for crop in range(len(cls)):
            patches = (frames == crop).nonzero()[:, 0]
            flow[patches] = flow[patches] / flow[patches].sum()
            own = self._value_attention(values[patches], cls[crop])
            running[patches] = (flow[patches] + own / own.sum()) * values[patches].mean(1).abs().sum(-1)
        if "score" in state:
            before, score = state["score"]
            running = (score[torch.searchsorted(before, index)] + running) / 2
        state["score"] = index, running
        distance = (sites[-1].layer or 0) - (sites[cut].layer or 0)
        left = self._left(flow, frames, self._shares(coords, frames, len(cls), count), distance)
        return group_top_k(running, frames, left)

    def _value_attention(self, values: Tensor, cls: Tensor) -> Tensor:
        """float (n,) from values of one crop's patches, (n, A, D), and of its CLS token, (A, D)."""
        products = (torch.cat([cls[None], values]) * cls).sum(-1)
        return products.softmax(0)[1:].mean(1)

    def _shares(self, coords: Tensor, frames: Tensor, crops: int, count: int) -> Tensor:
        """T of each crop, int64 (E,): by the grids, which are the same before every cut."""
        areas = torch.zeros(crops, dtype=torch.float64, device=frames.device)
        areas = areas.scatter(0, frames, (coords[:, 3] * coords[:, 4]).double())
        return quotas(areas, count, group_sizes(frames, crops))

    def _left(self, flow: Tensor, frames: Tensor, shares: Tensor, distance: int) -> Tensor:
        """How many each crop leaves, int64 (E,). flow: float (V,), attention that sums to 1 in each crop."""
        sizes = group_sizes(frames, len(shares))
        if distance == 0:
            return shares
        if distance % 2:
            return sizes
        entropy = torch.zeros_like(shares, dtype=flow.dtype).index_add(0, frames, torch.special.entr(flow))
        concentration = 1 - (entropy / sizes.clamp(min=2).to(flow.dtype).log()).square()
        gone = ((sizes - shares) / math.sqrt(distance) * concentration).round().long()
        return (sizes - gone).maximum(shares)

    @hookimpl
    def flops(self, shape: ModelShape, text: int, visual: int) -> int:
        """Of one block: a row of attention and the products of values, in a tower as wide as the decoder."""
        return 5 * visual * shape.hidden
