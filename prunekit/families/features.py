"""What an encoding method returns, as one entry for each image or video; see `Modality.features`.

Models of today return that themselves. Older versions of transformers return frames, tiles or all images together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Features = Callable[[Mapping[str, Any], Any], Sequence[Tensor]]


def each(arguments: Mapping[str, Any], pooled: Any) -> Sequence[Tensor]:
    """The entries as they are; tokens of a grid or of frames, (frames, tokens, H), one behind the other."""
    return [one if one.ndim < 3 else one.flatten(0, -2) for one in pooled]


def by_prompt(arguments: Mapping[str, Any], pooled: Any) -> Sequence[Tensor]:
    """Tiles of each prompt together: before transformers 5.21 each tile has an entry of its own.

    So they stay where the pixels are not known, (prompts, tiles, ...), in which tiles of zeros are none.
    """
    if not isinstance(pooled, Tensor) or arguments.get("pixel_values") is None:
        return each(arguments, pooled)
    tiles = shown_tiles(arguments["pixel_values"]).sum(1).tolist()
    return [part.flatten(0, 1) for part in torch.split(pooled, tiles)]


def shown_tiles(pixels: Tensor) -> Tensor:
    """Which tiles of (prompts, tiles, ...) are encoded, bool (prompts, tiles): those that are not all zeros."""
    return (pixels != 0).flatten(2).any(-1)


def ending_with(newline: Tensor) -> Features:
    """Videos behind each of which a newline, (H,), stands, which the model puts there after it has encoded them."""

    def features(arguments: Mapping[str, Any], pooled: Any) -> Sequence[Tensor]:
        return [torch.cat([one, newline[None].to(one)]) for one in each(arguments, pooled)]

    return features


def split_by(tables: Callable[[Mapping[str, Any]], list[Tensor]]) -> Features:
    """Images as long as what `tables` makes of the arguments: before transformers 5.16 all are one table, (tokens, H).

    So they stay where the arguments are not known.
    """

    def features(arguments: Mapping[str, Any], pooled: Any) -> Sequence[Tensor]:
        if not isinstance(pooled, Tensor) or pooled.ndim != 2:
            return each(arguments, pooled)
        return torch.split(pooled, list(map(len, tables(arguments)))) if arguments else [pooled]

    return features
