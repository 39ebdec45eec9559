"""Towers that take all images as one sequence of tokens: what their blocks get beside the states is cut along.

Such a sequence is one row of the tower's batch. Rotations have one entry for each token; borders say where the part of
each image, video frame or window ends (https://arxiv.org/abs/2409.12191), or a mask does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from prunekit.engine.tokens.layout import Layout

ROTATIONS, BORDERS = "position_embeddings", "cu_seqlens"


def as_row(original: Callable[..., Any], hidden: Tensor) -> Callable[..., Any]:
    """A block that takes and gives states (T, W), as one that takes and gives (1, T, W); others as they are."""
    if hidden.ndim == 3:
        return original

    def block(states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = original(states[0], *args, **kwargs)
        return output[None]

    return block


def cut_along(kwargs: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """A block's arguments on the tokens that remain of the one sequence."""
    local, index = dict(kwargs), layout.index[0]
    if local.get(ROTATIONS) is not None:
        local[ROTATIONS] = tuple(part.index_select(0, index.to(part.device)) for part in local[ROTATIONS])
    if local.get(BORDERS) is not None:
        borders: Tensor = local[BORDERS]
        before = torch.searchsorted(index.to(borders.device), borders.to(index.dtype))
        local[BORDERS] = torch.unique_consecutive(before).to(borders.dtype)  # without parts that lost every token
        local.pop("max_seqlen", None)  # of the whole; only flash kernels want it
    return local
