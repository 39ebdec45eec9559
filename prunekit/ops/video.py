"""Following a video through time: what stood at the same place before, and where one scene ends."""

from __future__ import annotations

import torch
from torch import Tensor

from prunekit.ops.topk import top_k_mask


def same_place(coords: Tensor, frames: Tensor, steps: int | None = None) -> Tensor:
    """The token at the same row and column of the same video `steps` frames before: int64 (V,); -1 where none is left.

    coords: int64 (V, 5), frames: int64 (V,), as hooks get them for one sample; each place of a frame at most once.
    steps: None takes the nearest earlier frame in which the place is left. -1 for tokens that show nothing.

    Source: EVS (https://arxiv.org/abs/2510.14624) and DyCoke (https://arxiv.org/abs/2411.15024) look a fixed number of
    frames back, FrameFusion (https://arxiv.org/abs/2501.01986) to what earlier merges have left.
    """
    shows = coords[:, 1] >= 0
    spans = (*coords[:, 1:3].amax(0), frames.amax() + (steps or 0))
    key = coords[:, 0]
    for part, span in zip((coords[:, 1], coords[:, 2], frames), spans, strict=True):
        key = key * (span + 1) + part
    key = torch.where(shows, key, -1 - torch.arange(len(key), device=key.device))
    ordered, order = key.sort()
    wanted = key - (1 if steps is None else steps)
    # The last entry that is not above the wanted one.
    found = (torch.searchsorted(ordered, wanted, right=True) - 1).clamp(min=0)
    before, token = ordered[found], order[found]
    span = spans[2] + 1
    there = before // span == key // span if steps is None else before == wanted
    return torch.where(shows & there & (before >= 0) & (before < key), token, -1)


def segments(similarity: Tensor, threshold: float, least: int) -> Tensor:
    """The number of the segment that each frame of a video belongs to, ascending from 0: int64 (F,).

    similarity: float (F - 1,), of each frame with the next one. A new segment begins behind each similarity below
    `threshold`, and behind the lowest ones until there are `least` segments. Ties: lower index. NaN counts as lowest.

    Source: FastVID (https://arxiv.org/abs/2503.11187, LunarShen/FastVID@a40a109), FlashVID
    (https://arxiv.org/abs/2602.08024, Fanziyang-v/FlashVID@1d37422).
    """
    cuts = ~(similarity >= threshold) | top_k_mask(-similarity.nan_to_num(nan=-torch.inf), least - 1)
    return torch.nn.functional.pad(cuts.long().cumsum(0), (1, 0))
