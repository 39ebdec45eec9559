"""VisPruner (https://arxiv.org/abs/2412.01818, ICCV 2025): important visual tokens, and others that repeat nothing.

Rule, for each crop or frame with T tokens to keep: the first floor(important * T) are those with the largest mean over
heads of the CLS attention. The others, most attended first, are thinned out in rounds: every second one (the even ones)
has d_i = max_j cos(x_i, x_j) over the odd ones, the 8 with the largest d leave (in the last round as many as are too
many), and the next round's order is the other even ones by falling d, then the odd ones. x and the attention are of the
tower block whose output the projector gets. `important: 1` is FasterVLM.

Studied: Theia-4869/VisPruner@aefa01a, whose README has `important` 0.5 at 128 tokens, 0.75 at 64. Deviations: an odd
number of tokens, at which the authors' code fails, puts one more among the even ones; `keep` is of a sample and is
shared between its crops in proportion to their tokens, newlines last.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from prunekit import EncoderRows, ModelShape, hookimpl, strategy
from prunekit.ops import cosine, crop_quotas, group_members, ranks

ROUND = 8  # tokens that leave in one round
ROWS = {"cls": EncoderRows(), "mean": EncoderRows(layer=-1, query="mean")}


@strategy(
    paper="2412.01818",
    code="Theia-4869/VisPruner@aefa01a",
    inputs=lambda self: {"encoder_attention": ROWS[self.query]},
    per_sample=True,
)
class VisPruner:
    """Keep a part by the attention of the tower's CLS token, and fill up with what is least like the rest.

    important: the part, from 0 to 1. query: `cls`; or `mean`, of all patches of the last block, for towers without CLS,
    as the authors do with SigLIP.
    """

    important: float = 0.5
    query: Literal["cls", "mean"] = "cls"

    def __post_init__(self) -> None:
        if not 0 <= self.important <= 1:
            raise ValueError("important: is a part, from 0 to 1")

    @hookimpl
    def select_tokens(
        self, encoder_attention: Tensor, features: Tensor, coords: Tensor, frames: Tensor, count: int
    ) -> Tensor:
        """Bool (V,) with exactly `count` True."""
        groups, quota = crop_quotas(coords, frames, count)
        keep = torch.zeros_like(groups, dtype=torch.bool)
        for tokens, share in zip(group_members(groups, len(quota)), quota.tolist(), strict=True):
            keep[tokens[self._chosen(encoder_attention[tokens], features[tokens], share)]] = True
        return keep

    def _chosen(self, attention: Tensor, features: Tensor, count: int) -> Tensor:
        """Indices of one crop's tokens, int64 (count,)."""
        order = ranks(attention).argsort()
        first = math.floor(self.important * count + 1e-9)
        left, diverse = order[first:], count - first
        if not diverse:
            return order[:first]
        similarity = cosine(features)
        while len(left) > diverse:
            even, odd = left[::2], left[1::2]
            falling = ranks(similarity[even[:, None], odd].amax(1)).argsort()
            left = torch.cat([even[falling[min(ROUND, len(left) - diverse) :]], odd])
        return torch.cat([order[:first], left])

    @hookimpl
    def flops(self, shape: ModelShape, text: int, visual: int) -> int:
        """Rows of attention, and the cosines within each crop."""
        width, crop = shape.tower.width if shape.tower else 0, min(visual, shape.visual_tokens or visual)
        return 2 * visual * width * (crop + (crop if self.query == "mean" else 1))
