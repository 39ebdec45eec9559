"""HoliTom (https://arxiv.org/abs/2505.21334, NeurIPS 2025): what stands still once, of the rest what is attended to.

Rule, for a video of N tokens: a place is still from one frame to the next if the cosine there is above `tau`. The video
is cut into windows of frames such that the sum over windows of (places that are still throughout) x (frames - 1) is
largest, S. Still places become their mean over the window. With r = min(ratio / (1 - S / N), 1), of the m other tokens
of a frame the ceil(r m) stay that receive most attention in the tower. Of the m still places of a window round(r m) are
centres, by DPC-KNN (7 neighbours); those that others joined become beta x centre + (1 - beta) x mean of the others.

Studied: cokeshao/HoliTom@e9b2972, with its defaults D = 0 and windows of any length. `holitom_decoder` is its optional
second step: before layer 18 of 28 keep what the last token attends to; each dropped token, in order, is averaged with
the most similar kept one as it is by then. With a budget, frames and windows share it in proportion to what is left of
them, exactly; fewer stay where what stands still leaves fewer. Deviations: each video has a ratio of its own, the
authors raise that of the second further; positions and order stay, the mean of a window in its first frame; newlines
stay last. A still image is a video of one frame, and so is each of its crops; without a budget it passes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from prunekit import EncoderRows, ModelShape, Owners, Rows, Selection, Site, Sites, hookimpl, strategy
from prunekit.ops import (
    clip_shares,
    cosine,
    density_peaks,
    group_members,
    group_sizes,
    group_top_k,
    nearest_kept,
    precise,
    quotas,
    same_place,
    top_k_mask,
)

NEIGHBOURS = 7


@strategy(
    paper="2505.21334",
    code="cokeshao/HoliTom@e9b2972",
    group="video",
    keep="optional",
    per_sample=True,
    inputs={"encoder_attention": EncoderRows(query="mean")},
)
class HoliTom:
    """Merge what stands still in a video over time, then in space; of the rest keep what the tower attends to.

    ratio: the part of a video that stays, used where no budget is given. tau: the cosine above which a place is still.
    beta: the part of the centre in a cluster that others joined.
    """

    ratio: float = 0.15
    tau: float = 0.8
    beta: float = 0.6

    def __post_init__(self) -> None:
        for name in ("ratio", "beta"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}: is {getattr(self, name)}; it is a part, above 0 and up to 1")

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
        itself = torch.arange(len(keep), device=keep.device)
        owner, amounts = torch.where(keep, itself, -1), torch.ones_like(precise(hidden)[:, 0])
        for tokens, share in clips:
            x, frame = precise(hidden[tokens]), frames[tokens] - frames[tokens].amin()
            group, window = self._still(x, coords[tokens], frame)
            joins, amounts[tokens] = self._of_clip(x, encoder_attention[tokens], frame, group, window, share)
            owner[tokens] = torch.where(joins >= 0, tokens[joins.clamp(min=0)], -1)
        return Selection(owner == itself, Owners(owner, "sum", amounts))

    def _still(self, x: Tensor, coords: Tensor, frame: Tensor) -> tuple[Tensor, Tensor]:
        """The first token of the still place that each token belongs to, int64 (n,), -1 for others; and its window."""
        before = same_place(coords, frame, 1)
        alike = cosine_similarity(x, x[before.clamp(min=0)], dim=-1)
        _, place = torch.unique(coords[:, 1:3], dim=0, return_inverse=True)
        still = torch.zeros(int(frame.max()), int(place.max()) + 1, dtype=torch.bool, device=x.device)
        moved = before >= 0
        still[frame[moved] - 1, place[moved]] = alike[moved] > self.tau
        starts = _windows(still)
        first = torch.full_like(place, -1)
        window = torch.zeros_like(place)
        token = torch.full((len(still) + 1, still.shape[1]), -1, dtype=torch.int64, device=x.device)
        token[frame, place] = torch.arange(len(x), device=x.device)
        for number, (start, end) in enumerate(zip(starts, [*starts[1:], len(token)], strict=True)):
            inside = (frame >= start) & (frame < end)
            window[inside] = number
            if end - start > 1:
                through = still[start : end - 1].all(0)
                first[inside] = torch.where(through[place[inside]], token[start, place[inside]], -1)
        return first, window

    def _of_clip(
        self, x: Tensor, attention: Tensor, frame: Tensor, first: Tensor, window: Tensor, share: int | None
    ) -> tuple[Tensor, Tensor]:
        """Who joins whom in one clip, int64 (n,), and with which factor, (n,)."""
        itself = torch.arange(len(x), device=x.device)
        frames, windows = int(frame.max()) + 1, int(window.max()) + 1
        moving = frame.masked_fill(first >= 0, -1)
        centres = window.masked_fill(first != itself, -1)
        sizes = torch.cat([group_sizes(moving, frames), group_sizes(centres, windows)])
        if share is None:
            ratio = min(self.ratio * len(x) / int(sizes.sum()), 1.0)
            quota = torch.cat([(sizes[:frames] * ratio - 1e-9).ceil(), (sizes[frames:] * ratio).round()]).long()
        else:
            quota = quotas(sizes.double(), share, sizes)
        owner = torch.where(group_top_k(attention, moving, quota[:frames]), itself, -1)
        still, length = first >= 0, group_sizes(first, len(x))
        means = torch.zeros_like(x).index_add(0, first[still], x[still]) / length.clamp(min=1)[:, None]
        factor = torch.ones_like(x[:, 0])
        for places, number in zip(group_members(centres, windows), quota[frames:].tolist(), strict=True):
            if number:
                apart = torch.cdist(means[places], means[places], compute_mode="donot_use_mm_for_euclid_dist")
                joins = density_peaks(apart / x.shape[1] ** 0.5, number, min(number, NEIGHBOURS))
                others = (group_sizes(joins, len(places))[joins] - 1).to(x)
                centre = joins == torch.arange(len(places), device=x.device)
                alone = torch.where(others > 0, self.beta, torch.ones_like(others))
                part = torch.where(centre, alone, (1 - self.beta) / others)
                owner[places], factor[places] = places[joins], part / length[places]
        return torch.where(still, owner[first], owner), torch.where(still, factor[first], factor)

    @hookimpl
    def flops(self, shape: ModelShape, text: int, visual: int) -> int:
        """A map of the tower, a cosine for each token, and distances of still places."""
        width, crop = shape.tower.width if shape.tower else 0, min(visual, shape.visual_tokens or visual)
        return 2 * visual * (crop * (width + 2 * shape.hidden) + 3 * shape.hidden)


def _windows(still: Tensor) -> list[int]:
    """The first frames of windows that save most tokens, from bool (T - 1, places); of equals the shortest last one."""
    frames = len(still) + 1
    saved = torch.zeros(frames, frames, dtype=torch.int64)
    for start in range(frames - 1):
        throughout = still[start:].long().cumprod(0).sum(1).cpu()
        saved[start, start + 1 :] = throughout * torch.arange(1, frames - start)
    table = saved.tolist()
    best, begin = [0] * (frames + 1), [0] * frames
    for end in range(frames):
        best[end + 1], begin[end] = best[end], end
        for start in range(end - 1, -1, -1):
            if best[start] + table[start][end] > best[end + 1]:
                best[end + 1], begin[end] = best[start] + table[start][end], start
    starts, end = list[int](), frames - 1
    while end >= 0:
        starts.append(begin[end])
        end = begin[end] - 1
    return starts[::-1]


@strategy(
    paper="2505.21334",
    code="cokeshao/HoliTom@e9b2972",
    group="video",
    sites=Sites(default=lambda layers: Site(max(layers * 18 // 28, 1)), encoder=False, lowest=1),
    inputs={"attention": Rows(layer="previous", queries="last", heads="mean")},
    per_sample=True,
)
class HoliTomDecoder:
    """Keep what the last prompt token attends to in the layer before; each other token halves with its likest kept."""

    @hookimpl
    def select_tokens(self, attention: Tensor, hidden: Tensor, count: int) -> Selection:
        """Bool (V,) and who joins whom, from attention, float (V,), and states, float (V, H)."""
        keep = top_k_mask(attention, count)
        owner = nearest_kept(cosine(hidden), keep)
        later = ((owner[:, None] == owner) & ~keep).triu().sum(1)
        halved = torch.where(keep, group_sizes(owner.masked_fill(keep, -1), len(keep)), later)
        return Selection(keep, Owners(owner, "sum", torch.full_like(precise(hidden)[:, 0], 0.5) ** halved))

    @hookimpl
    def flops(self, shape: ModelShape, text: int, visual: int) -> int:
        """One row, and all cosines."""
        return shape.row_flops(1, text + visual) + 2 * visual**2 * shape.hidden
