"""VidCom2 (https://arxiv.org/abs/2505.14454, EMNLP 2025): frames unlike the video get more, and keep what is rare.

Rule, for a clip of T frames: x are the projected tokens in the half of the channels that varies least over the clip,
L2-normalised; g(x, c) = sum over a in {1/8, 1/4, 1/2, 1, 2} of exp(-|x - c|^2 / (2 a)). With the means v of the clip
and f_t of frame t, S = g(x, v) + g(x, f_t). Frame t of n tokens keeps the max(1, round(r_t n)) with the lowest S, where
r_t = min(1, base (1 + p_t - 1/T)), p = softmax over frames of -mean_t g(x, v) / 0.01.

Studied: xuyang-liu16/VidCom2@944a17d. With a budget, base is the clip's share, and counts are exact as in vLLM's form:
at last kept tokens with the highest S of the whole clip leave, or dropped ones with the lowest S come back. Deviations:
positions stay and tokens keep their order; newlines stay last, the authors keep all on top; vLLM leaves at least as
many tokens as frames. A still image is a clip of one frame, and so is each of its crops; without a budget it passes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from prunekit import ModelShape, hookimpl, strategy
from prunekit.ops import clip_shares, group_means, group_sizes, group_top_k, precise, ranks, top_k_mask

WIDTHS = (1 / 8, 1 / 4, 1 / 2, 1, 2)
TEMPERATURE = 0.01


@strategy(paper="2505.14454", code="xuyang-liu16/VidCom2@944a17d", group="video", keep="optional", per_sample=True)
class VidCom2:
    """Keep of a video what is unlike the whole and unlike its frame, more of frames that are unlike the others.

    base: the part of a video that stays on average, before rounding; used where no budget is given.
    """

    base: float = 0.25

    def __post_init__(self) -> None:
        if not 0 < self.base <= 1:
            raise ValueError(f"base: is {self.base}; it is a part, above 0 and up to 1")

    @hookimpl
    def select_tokens(
        self, hidden: Tensor, coords: Tensor, frames: Tensor, videos: Tensor, count: int | None
    ) -> Tensor:
        """Bool (V,): `count` True, or as many as `base` says of videos."""
        keep, clips = clip_shares(coords, frames, videos, count)
        for tokens, share in clips:
            keep[tokens] = self._of_clip(precise(hidden[tokens]), frames[tokens], share)
        return keep

    def _of_clip(self, hidden: Tensor, frames: Tensor, share: int | None) -> Tensor:
        """Bool (n,) of one clip."""
        present, frame = torch.unique(frames, return_inverse=True)
        sizes = group_sizes(frame, len(present))
        steady = hidden.var(0, correction=0).argsort(stable=True)[: hidden.shape[1] // 2]
        x = normalize(hidden[:, steady], dim=-1)
        common = _alike(x, x.mean(0))
        rare = -common - _alike(x, group_means(x, frame, len(present))[frame])
        odd = (-group_means(common, frame, len(present)) / TEMPERATURE).softmax(0)
        ratio = (self.base if share is None else share / len(x)) * (1 + odd - odd.mean())
        quota = (ratio.clamp(max=1) * sizes).round().long().clamp(min=1)
        keep = group_top_k(rare, frame, quota)
        return keep if share is None else top_k_mask(keep * len(x) - ranks(rare), share)

    @hookimpl
    def flops(self, shape: ModelShape, text: int, visual: int) -> int:
        """Variances, norms and two distances, about ten operations a number, and means of frames, if 32 of them."""
        return (10 + 32) * visual * shape.hidden


def _alike(x: Tensor, centre: Tensor) -> Tensor:
    """g, (n,) from (n, W)."""
    apart = (x - centre).square().sum(-1)
    return torch.stack([(-apart / (2 * width)).exp() for width in WIDTHS]).sum(0)
