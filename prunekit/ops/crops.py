"""Spreading a budget over the crops or frames that a sample shows."""

from __future__ import annotations

import torch
from torch import Tensor

from prunekit.ops.groups import group_sizes, quotas
from prunekit.ops.topk import Counts

NOTHING = torch.iinfo(torch.int64).max


def crop_quotas(coords: Tensor, frames: Tensor, count: Counts) -> tuple[Tensor, Tensor]:
    """Each crop's or frame's share of `count`: groups, int64 (V,), and quotas, int64 (G,), for `group_top_k`.

    coords: int64 (V, 5), frames: int64 (V,), as hooks get them for one sample. Groups are the crops and frames of all
    images that have tokens left, in order; their shares are in proportion to these tokens, by the largest remainder.
    Tokens that show nothing, such as newlines, are the last group; they get what the others cannot hold. Reads the
    number of groups, so it waits for the device.
    """
    keys = coords[:, 0] * (frames.amax() + 1) + frames
    keys, groups = torch.unique(keys.masked_fill(coords[:, 1] < 0, NOTHING), return_inverse=True)
    sizes = group_sizes(groups, len(keys))
    return groups, quotas(sizes.double().masked_fill(keys == NOTHING, 0.0), count, sizes)
