"""What is noted about pictures when they are encoded, and finds its way to the prompt that shows them.

`generate` encodes pictures before it calls the model, and repeats the features for beams. The notes ride on the
encoder's output object, which survives that; they are in the order of the pictures before any repetition.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from prunekit.families.base import Modality

_NOTE = "_prunekit_pictures"
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# One odd factor per dimension, so that a pixel's weight depends on where it is and not on how wide the padding is.
_FACTORS = (7919, 104729, 1299709, 15485863)


@dataclass(frozen=True)
class Pictures:
    """The pictures of one kind that one call encoded.

    arguments: of the encoding method, by name. counts: visual tokens of each picture. tower: what the vision side took
    down, by name, one entry per picture.
    """

    modality: Modality
    arguments: Mapping[str, Any]
    counts: tuple[int, ...]
    tower: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def places(self) -> list[Tensor]:
        """As `Modality.coords`."""
        return self.modality.coords(self.arguments, self.counts)

    @cached_property
    def checksums(self) -> list[int] | None:
        """One number per picture from its pixels alone; None where pixels were not given or cannot be told apart."""
        pixels = self.arguments.get(self.modality.pixels)
        if not isinstance(pixels, Tensor):
            return None
        parts = _split(pixels, self.counts)
        return None if parts is None else [int(n) for n in torch.stack([pixel_checksum(part) for part in parts])]


def note(output: Any, pictures: Pictures) -> None:
    """Leave `pictures` on the output of an encoder."""
    setattr(output, _NOTE, pictures)


def noted(output: Any, modality: Modality) -> Pictures | None:
    """What was left on an output; of features that nobody watched being encoded, what they show themselves."""
    features = getattr(output, "pooler_output", None)
    if features is None:
        return None
    found: Pictures | None = getattr(output, _NOTE, None)
    return found or Pictures(modality, {}, counts_of(features))


def counts_of(features: Any) -> tuple[int, ...]:
    """Visual tokens of each picture in a `pooler_output`: a list of (tokens, H), or a tensor (pictures, tokens, H)."""
    return tuple(len(picture) for picture in features)


def pixel_checksum(pixels: Tensor) -> Tensor:
    """One int64 from the bits of a picture's pixels, of up to four dimensions; zeros beside it do not change it."""
    value = pixels.detach().contiguous().view(_BITS[pixels.element_size()]).to(torch.int64)
    weight = torch.ones((), dtype=torch.int64, device=value.device)
    for dim, factor in zip(range(value.ndim), _FACTORS, strict=False):
        place = torch.arange(value.shape[dim], device=value.device) * factor
        weight = weight + place.view([-1 if one == dim else 1 for one in range(value.ndim)])
    return (value * (weight % 8191 + 1)).sum()


def _split(pixels: Tensor, counts: Sequence[int]) -> list[Tensor] | None:
    """The pixels of each picture: one entry each, or (rows, pictures, ...) with empty ones, or patches in a row."""
    if len(pixels) == len(counts):
        return list(pixels)
    if pixels.ndim == 5:
        shown = [picture for picture in pixels.flatten(0, 1) if bool(picture.any())]
        return shown if len(shown) == len(counts) else None
    each, rest = divmod(len(pixels), sum(counts) or 1)
    return None if rest or not each else list(torch.split(pixels, [each * count for count in counts]))
