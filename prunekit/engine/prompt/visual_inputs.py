"""What is recorded of images and videos when they are encoded, and reaches the prompt that shows them.

`generate` encodes them before it calls the model, and repeats the features for beams. The record is an attribute of the
encoder's output object, which survives that; it is in the order of the inputs before any repetition.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from prunekit.families.base import Modality

_ATTRIBUTE = "_prunekit_visual_inputs"
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# One odd factor per dimension, so that a pixel's weight depends on where it is and not on how wide the padding is.
_FACTORS = (7919, 104729, 1299709, 15485863)


# Whether an encoding method of the model runs in this context.
ENCODES: ContextVar[bool] = ContextVar("prunekit_encodes", default=False)


@dataclass(frozen=True)
class VisualInputs:
    """The images, or the videos, that one call encoded.

    arguments: of the encoding method, by name. counts: visual tokens of each. tower: the record of the vision tower;
    None where no stage cuts or reads it.
    """

    modality: Modality
    arguments: Mapping[str, Any]
    counts: tuple[int, ...]
    tower: Any = None

    @cached_property
    def coords(self) -> list[Tensor]:
        """As `Modality.coords`, int64 (n, 9): the place in the whole is that in the crop where none is told apart."""
        return [one if one.shape[1] == 9 else torch.cat([one, one[:, 1:]], dim=1) for one in self._tables]

    @property
    def joined(self) -> list[bool]:
        """Of each, whether its family says where the crops stand in the whole."""
        return [one.shape[1] == 9 for one in self._tables]

    @cached_property
    def _tables(self) -> list[Tensor]:
        return self.modality.coords(self.arguments, self.counts)

    @cached_property
    def checksums(self) -> list[int] | None:
        """One number for each from its pixels alone; None where pixels were not given or cannot be told apart."""
        pixels = self.arguments.get(self.modality.pixels)
        if not isinstance(pixels, Tensor):
            return None
        parts = _split(pixels, self.counts)
        return None if parts is None else [int(n) for n in torch.stack([pixel_checksum(part) for part in parts])]


def record_on(output: Any, inputs: VisualInputs) -> None:
    """Record on the output of an encoder what it encoded."""
    setattr(output, _ATTRIBUTE, inputs)


def recorded_on(output: Any, modality: Modality) -> VisualInputs | None:
    """What was recorded on an output; of features that were encoded elsewhere, what they show themselves."""
    features = getattr(output, "pooler_output", None)
    if features is None:
        return None
    inputs: VisualInputs | None = getattr(output, _ATTRIBUTE, None)
    return inputs or VisualInputs(modality, {}, counts_of(modality.features({}, features)))


def counts_of(features: Sequence[Tensor]) -> tuple[int, ...]:
    """Visual tokens of each entry of what `Modality.features` gives."""
    return tuple(map(len, features))


def pixel_checksum(pixels: Tensor) -> Tensor:
    """One int64 from the bits of one input's pixels, of up to four dimensions; zeros beside it do not change it."""
    value = pixels.detach().contiguous().view(_BITS[pixels.element_size()]).to(torch.int64)
    weight = torch.ones((), dtype=torch.int64, device=value.device)
    for dim, factor in zip(range(value.ndim), _FACTORS, strict=False):
        along = torch.arange(value.shape[dim], device=value.device) * factor
        weight = weight + along.view([-1 if one == dim else 1 for one in range(value.ndim)])
    return (value * (weight % 8191 + 1)).sum()


def _split(pixels: Tensor, counts: Sequence[int]) -> list[Tensor] | None:
    """The pixels of each input: one entry each, or (rows, images, ...) with empty ones, or patches in a row."""
    if len(pixels) == len(counts):
        return list(pixels)
    if pixels.ndim == 5:
        shown = [image for image in pixels.flatten(0, 1) if bool(image.any())]
        return shown if len(shown) == len(counts) else None
    each, rest = divmod(len(pixels), sum(counts) or 1)
    return None if rest or not each else list(torch.split(pixels, [each * count for count in counts]))
