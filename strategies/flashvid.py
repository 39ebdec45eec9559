"""FlashVID (https://arxiv.org/abs/2602.08024, ICLR 2026): of each frame what is attended and diverse, the rest merged.

Rule, for frames of n tokens: b = ceil(ratio expansion n), a = ceil(alpha b) of them selected. Segments end where the
cosine of mean tokens of adjacent frames is below `segment`, and at the lowest ones until there are `segments`.
ADTS, in each frame: max-min on D_ij = (1 - cos(x_i, x_j)) attn_j e_j, with e_j = x_j . mean token of the segment.
TSTM, in each segment, of the others: a token joins the most similar one of the frame before where their cosine is above
`temporal`, as long as the segment keeps its sum of b; trees become their mean; the roots of a frame cluster by DPC-KNN
(7 neighbours) to its part of the segment's sum of b - a, and become the mean of their cluster, in the centre's place.

Studied: Fanziyang-v/FlashVID@1d37422. Before layer 20 of 28 the authors then keep 0.3 of what is left by the attention
of the last token: add a stage `fastv` with `keep_of: current`. With a budget frames share it evenly, and roots exactly.
Deviations: trees are divided by their true size, the authors' counts make static tokens too long; selected tokens of a
one-frame segment are not clustered again; none is selected twice; no random noise. Positions stay, newlines stay last.
A still image is a video of one frame, and so is each of its crops; without a budget it passes.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from prunekit import EncoderRows, ModelShape, Owners, Selection, hookimpl, strategy
from prunekit.ops import (
    clip_shares,
    cosine,
    density_peaks,
    group_means,
    group_members,
    group_sizes,
    group_top_k,
    index_mask,
    max_min,
    precise,
    quotas,
    segments,
)

NEIGHBOURS = 7


@strategy(
    paper="2602.08024",
    code="Fanziyang-v/FlashVID@1d37422",
    group="video",
    keep="optional",
    per_sample=True,
    inputs={"encoder_attention": EncoderRows(query="mean")},
)
class FlashVID:
    """Keep of each frame of a video what is attended to and diverse; merge the rest in time, then in space.

    ratio: the part of a video that is to stay, times `expansion`; used where no budget is given. alpha: the part of it
    that is selected, not merged. temporal: tokens with a larger cosine merge in time. segment: frames with a smaller
    one begin a segment. segments: how many there are at least. method: `attn_div` leaves out e_j.
    """

    ratio: float = 0.1
    expansion: float = 1.25
    alpha: float = 0.7
    temporal: float = 0.8
    segment: float = 0.9
    segments: int = 8
    method: Literal["attn_div_v2", "attn_div"] = "attn_div_v2"

    def __post_init__(self) -> None:
        for name in ("ratio", "alpha"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}: is {getattr(self, name)}; it is a part, above 0 and up to 1")
        if self.expansion <= 0:
            raise ValueError(f"expansion: is {self.expansion}; it is a factor above 0")

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
        """Bool (V,) and who joins whom, from tokens, float (V, H), and the attention that they receive, float (V,)."""
        keep, clips = clip_shares(coords, frames, videos, count)
        owner = torch.where(keep, torch.arange(len(keep), device=keep.device), -1)
        amounts = torch.ones(len(keep), device=keep.device, dtype=precise(hidden).dtype)
        for tokens, share in clips:
            _, frame = torch.unique(frames[tokens], return_inverse=True)
            joins, part = self._of_clip(precise(hidden[tokens]), encoder_attention[tokens], frame, share)
            owner[tokens] = torch.where(joins >= 0, tokens[joins.clamp(min=0)], -1)
            amounts[tokens] = part
        itself = torch.arange(len(keep), device=keep.device)
        return Selection(owner == itself, Owners(owner, "sum", amounts))

    def _of_clip(self, x: Tensor, attention: Tensor, frame: Tensor, share: int | None) -> tuple[Tensor, Tensor]:
        """Who joins whom in one clip, int64 (n,), and with which factor, (n,). frame: int64 (n,), from 0."""
        sizes = group_sizes(frame, int(frame.max()) + 1)
        if share is None:
            budget = (sizes * self.ratio * self.expansion - 1e-9).ceil().long().minimum(sizes)
        else:
            budget = quotas(sizes.double(), share, sizes)
        chosen = (budget * self.alpha - 1e-9).ceil().long()
        means = group_means(x, frame, len(sizes))
        scene = segments(cosine_similarity(means[:-1], means[1:], dim=-1), self.segment, self.segments)
        event = (x * group_means(means, scene, int(scene[-1]) + 1)[scene[frame]]).sum(-1)
        weights = attention.to(x) * (event if self.method == "attn_div_v2" else 1)
        members = group_members(frame, len(sizes))
        selected = torch.zeros_like(frame, dtype=torch.bool)
        for tokens, number in zip(members, chosen.tolist(), strict=True):
            order = max_min(1 - cosine(x[tokens]), number, weights=weights[tokens])
            selected[tokens] = index_mask(order, len(tokens))
        root = self._in_time(x, frame, selected, scene, budget)
        return self._in_space(x, frame, selected, root, scene, budget - chosen, share is not None)

    def _in_time(self, x: Tensor, frame: Tensor, selected: Tensor, scene: Tensor, budget: Tensor) -> Tensor:
        """The root of the tree that each token belongs to, int64 (n,); selected ones are their own.

        scene: the segment of each frame, int64 (T,). budget: what each is to keep, int64 (T,).
        """
        root, parent = torch.arange(len(x), device=x.device), torch.arange(len(x), device=x.device)
        alike = torch.full_like(x[:, 0], -torch.inf)
        free = group_members(frame.masked_fill(selected, -1), len(scene))
        same = (scene[1:] == scene[:-1]).tolist()
        for before, now, one in zip(free, free[1:], same, strict=False):
            if one and len(before) and len(now):
                alike[now], nearest = cosine(x[now], x[before]).max(-1)
                parent[now] = before[nearest]
        wanted, total = alike > self.temporal, int(scene[-1]) + 1
        number = group_sizes(scene[frame].masked_fill(~wanted, -1), total)
        room = group_sizes(scene[frame], total) - torch.zeros_like(number).index_add(0, scene, budget)
        quota = torch.where(number > room, (room - 1).clamp(min=0), number)
        joins = group_top_k(alike, scene[frame].masked_fill(~wanted, -1), quota)
        for now in free[1:]:
            root[now] = torch.where(joins[now], root[parent[now]], root[now])
        return root

    def _in_space(
        self, x: Tensor, frame: Tensor, selected: Tensor, root: Tensor, scene: Tensor, rest: Tensor, exact: bool
    ) -> tuple[Tensor, Tensor]:
        """As `_of_clip`. rest: how many clusters each frame brings to those of its segment, int64 (T,)."""
        itself = torch.arange(len(x), device=x.device)
        tree = torch.zeros_like(x[:, 0]).index_add(0, root, torch.ones_like(x[:, 0]))
        merged = torch.zeros_like(x).index_add(0, root, x) / tree.clamp(min=1)[:, None]
        roots = group_members(frame.masked_fill(selected | (root != itself), -1), len(scene))
        room = torch.tensor([len(one) for one in roots], device=x.device)
        here = scene == torch.arange(int(scene[-1]) + 1, device=x.device)[:, None]
        wanted = (here * rest).sum(1)
        if exact:
            clusters = quotas((here * room).double(), wanted, here * room).sum(0)
        else:
            part = wanted / (here * room).sum(1).clamp(min=1).double()
            clusters = (room * part[scene] - 1e-9).ceil().long().minimum(room)
        centre = torch.full_like(root, -1)
        for tokens, number in zip(roots, clusters.tolist(), strict=True):
            if number:
                apart = torch.cdist(merged[tokens], merged[tokens], compute_mode="donot_use_mm_for_euclid_dist")
                joins = density_peaks(apart / x.shape[1] ** 0.5, number, min(number, NEIGHBOURS))
                centre[tokens] = tokens[joins]
        many = torch.zeros_like(tree).index_add(0, centre.clamp(min=0), (centre >= 0).to(tree))
        owner = torch.where(selected, itself, centre[root])
        return owner, torch.where(selected, 1.0, 1 / (tree[root] * many[owner.clamp(min=0)].clamp(min=1)))

    @hookimpl
    def flops(self, shape: ModelShape, text: int, visual: int) -> int:
        """A map of the tower, cosines within frames and between them, and distances."""
        width, crop = shape.tower.width if shape.tower else 0, min(visual, shape.visual_tokens or visual)
        return 2 * visual * crop * (width + 3 * shape.hidden)
