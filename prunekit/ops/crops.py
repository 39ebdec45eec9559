"""Spreading a budget over the crops, frames or clips that a sample shows."""

from __future__ import annotations

import torch
from torch import Tensor

from prunekit.ops.groups import group_members, group_sizes, quotas
from prunekit.ops.topk import Counts

NOTHING = torch.iinfo(torch.int64).max


def crop_quotas(coords: Tensor, frames: Tensor, count: Counts, videos: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Each crop's or frame's share of `count`: groups, int64 (V,), and quotas, int64 (G,), for `group_top_k`.

    coords: int64 (V, 5), frames: int64 (V,), videos: bool (V,), as hooks get them for one sample. Groups are the crops
    and frames of all images that have tokens left, in order; with `videos`, all frames of a video are one group. Their
    shares are in proportion to these tokens, by the largest remainder. Tokens that show nothing, such as newlines, are
    the last group; they get what the others cannot hold. Reads the number of groups, so it waits for the device.
    """
    apart = frames if videos is None else frames.masked_fill(videos, 0)
    keys = coords[:, 0] * (frames.amax() + 1) + apart
    keys, groups = torch.unique(keys.masked_fill(coords[:, 1] < 0, NOTHING), return_inverse=True)
    sizes = group_sizes(groups, len(keys))
    return groups, quotas(sizes.double().masked_fill(keys == NOTHING, 0.0), count, sizes)


def clip_shares(
    coords: Tensor, frames: Tensor, videos: Tensor, count: int | None
) -> tuple[Tensor, tuple[tuple[Tensor, int | None], ...]]:
    """Who stays without being asked, bool (V,), and the clips among whose tokens to choose, int64 (n,), with how many.

    coords: int64 (V, 5), frames: int64 (V,), videos: bool (V,), count, as hooks get them for one sample. A clip is a
    video, or one crop of a still image, as a video of one frame. Clips share `count` as in `crop_quotas`; one that
    keeps all or none of its tokens needs no choice, nor do tokens that show nothing, of which the first stay. A count
    of None: how many stay of a video is the caller's to say (None), everything else stays.
    """
    groups, quota = crop_quotas(coords, frames, len(frames) if count is None else count, videos)
    stays, asked = torch.zeros_like(videos), list[tuple[Tensor, int | None]]()
    for tokens, share in zip(group_members(groups, len(quota)), quota.tolist(), strict=True):
        shows = bool(coords[tokens[0], 1] >= 0)
        if count is None and shows and bool(videos[tokens[0]]):
            asked.append((tokens, None))
        elif shows and 0 < share < len(tokens):
            asked.append((tokens, share))
        else:
            stays[tokens[:share]] = True
    return stays, tuple(asked)
