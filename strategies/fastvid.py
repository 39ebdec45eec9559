"""FastVID (https://arxiv.org/abs/2503.11187, NeurIPS 2025): salient tokens of each frame, and dense ones that sum up.

Rule, for frames of n tokens: b = int(ratio n), int(d b) of them context, the others salient. Segments end where the
cosine of adjacent frames is below `tau`, and at the lowest ones until there are `segments`. Salient are the tokens with
the most attention in the tower. Of a segment of L frames every `every`-th, counted from the last one, is an anchor
frame; these share the segment's context, rounded down. Anchors are the centres of DPC-KNN (4 neighbours) among the
other tokens of their frame. For each anchor frame, the other tokens of the whole segment go to the likest anchor (by
cosine), which becomes w x + (1 - w) mean of its m tokens, itself among them, w = max(1 / (m + 1), beta).

Studied: LunarShen/FastVID@a40a109. A frame is its mean token, and attention the mean over all queries, as in the
authors' code for Qwen2.5-VL; for SigLIP they take both from its pooling head, which checkpoints for transformers often
lack: `query: pool` takes the attention. With a budget frames share it evenly, and anchor frames their context exactly;
what they cannot hold goes to the other frames. Deviations: no random noise; a frame keeps one token at least without a
budget. Positions stay, newlines stay last. A token goes to an anchor in each anchor frame, so that the merge is a dense
matrix of V x V numbers. A still image is a video of one frame, and so is each of its crops; without a budget it passes.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from prunekit import EncoderRows, ModelShape, Selection, hookimpl, strategy
from prunekit.ops import (
    clip_shares,
    cosine,
    density_peaks,
    group_means,
    group_members,
    group_sizes,
    group_top_k,
    precise,
    quotas,
    segments,
)

NEIGHBOURS = 4


@strategy(
    paper="2503.11187",
    code="LunarShen/FastVID@a40a109",
    group="video",
    keep="optional",
    per_sample=True,
    inputs=lambda self: {"encoder_attention": EncoderRows(query=self.query)},
)
class FastVID:
    """Keep of each frame of a video what is salient, and of some frames dense tokens that sum up their segment.

    ratio: the part of a video that stays, used where no budget is given. segments: how many there are at least. tau:
    frames with a smaller cosine begin a segment. d: the part of what stays that sums up. every: one of so many frames
    holds what sums up. beta: the least weight of an anchor. query: whose attention says what is salient.
    """

    ratio: float = 0.1
    segments: int = 8
    tau: float = 0.9
    d: float = 0.4
    every: int = 4
    beta: float = 0.6
    query: Literal["mean", "pool", "cls"] = "mean"

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio: is {self.ratio}; it is a part, above 0 and up to 1")
        for name in ("d", "beta"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: is {getattr(self, name)}; it is a part, from 0 to 1")
        if self.every < 1:
            raise ValueError(f"every: is {self.every}; it is a number of frames, from 1")

    @hookimpl
    def select_tokens(
        self,
        hidden: Tensor,
        encoder_attention: Tensor,
        coords: Tensor,
        frames: Tensor,
        videos: Tensor,
        count: int | None,
    ) -> Selection:
        """Bool (V,) and how tokens are summed up, from tokens, float (V, H), and their attention, float (V,)."""
        keep, clips = clip_shares(coords, frames, videos, count)
        weights = torch.eye(len(keep), dtype=precise(hidden).dtype, device=keep.device)
        for tokens, share in clips:
            _, frame = torch.unique(frames[tokens], return_inverse=True)
            rows = self._of_clip(precise(hidden[tokens]), encoder_attention[tokens], frame, share)
            weights[tokens[:, None], tokens] = rows
            keep[tokens] = rows.diagonal() > 0
        return Selection(keep, weights)

    def _of_clip(self, x: Tensor, attention: Tensor, frame: Tensor, share: int | None) -> Tensor:
        """How the tokens of one clip that stay are summed up, (n, n), zeros in the rows of those that go."""
        sizes = group_sizes(frame, int(frame.max()) + 1)
        if share is None:
            budget = (sizes * self.ratio + 1e-9).long().clamp(min=1)
        else:
            budget = quotas(sizes.double(), share, sizes)
        context = (budget * self.d + 1e-9).long()
        means = group_means(x, frame, len(sizes))
        scene = segments(cosine_similarity(means[:-1], means[1:], dim=-1), self.tau, self.segments)
        salient = group_top_k(attention, frame, budget - context)
        number = self._anchors(scene, context, sizes - budget + context, share is not None)
        rest = group_members(frame.masked_fill(salient, -1), len(sizes))
        weights = torch.diag(salient.to(x))
        for tokens, many, own in zip(rest, number.tolist(), scene.tolist(), strict=True):
            if many:
                apart = torch.cdist(x[tokens], x[tokens], compute_mode="donot_use_mm_for_euclid_dist")
                centres = density_peaks(apart / x.shape[1] ** 0.5, many, NEIGHBOURS).unique()
                pool = ((scene[frame] == own) & ~salient).nonzero()[:, 0]
                self._sum_up(x, tokens[centres], pool, weights)
        return weights

    def _anchors(self, scene: Tensor, context: Tensor, room: Tensor, exact: bool) -> Tensor:
        """How many anchors each frame holds, int64 (T,). room: tokens that are not salient, int64 (T,)."""
        same = scene[:, None] == scene
        behind = (same.triu(1)).sum(1)
        holds = behind % self.every == 0
        total = (same * context).sum(1)
        if not exact:
            return torch.where(holds, total // (same & holds).sum(1), 0).minimum(room)
        here = scene == torch.arange(int(scene[-1]) + 1, device=scene.device)[:, None]
        return quotas((here & holds).double(), (here * context).sum(1), here * room).sum(0)

    def _sum_up(self, x: Tensor, anchors: Tensor, pool: Tensor, weights: Tensor) -> None:
        """Write the rows of the anchors of one frame, to which the tokens of `pool`, int64 (m,), go."""
        to = cosine(x[pool], x[anchors]).argmax(1)
        member = (to == torch.arange(len(anchors), device=to.device)[:, None]).to(x)
        many = member.sum(1)
        own = (1 / (many + 1)).clamp(min=self.beta)
        weights[anchors[:, None], pool] = member * ((1 - own) / many.clamp(min=1))[:, None]
        weights[anchors, anchors] += own

    @hookimpl
    def flops(self, shape: ModelShape, text: int, visual: int) -> int:
        """A map of the tower, distances and cosines within frames, and the merge."""
        width, crop = shape.tower.width if shape.tower else 0, min(visual, shape.visual_tokens or visual)
        return 2 * visual * (crop * (width + 3 * shape.hidden) + visual * shape.hidden)
