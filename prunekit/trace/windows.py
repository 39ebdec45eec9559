"""Which part of an image each of its crops shows: read off what the model's own processor makes of test images.

Processors squash, cut out the middle, pad and tile. None says so in one way, but all are asked in one way: an image
whose colours are its coordinates, and a black and a white one of the same size, which tell padding from image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prunekit.families.images import PIXELS, Images
from prunekit.trace.boxes import Box

if TYPE_CHECKING:
    from PIL.Image import Image

Prepare = Callable[[list["Image"]], Mapping[str, Any]]
# How far colours may lie off the line that a crop of coordinates makes: a resized image is smooth, not exact.
STRAIGHT = 0.04
SNAP = 0.008  # of a side: what is that close to an edge of the image ends there


@dataclass(frozen=True)
class Window:
    """What one crop shows: a box of the image with this number."""

    picture: int
    box: Box


def windows_of(
    sizes: Sequence[tuple[int, int]], crops: Sequence[int], prepare: Prepare, holder: Images | None
) -> list[Window] | None:
    """What each crop of a prompt shows, in the order of the model's entries; None where that cannot be told.

    sizes: width and height in pixels of all images of the prompt. crops: of each entry that the model's encoder makes
    of them, how many crops it has; an entry may be an image, one of its tiles, or several images. prepare: from so many
    images to the model's inputs, as for the prompt. holder: how the model's tower takes images; None: not known.
    """
    paints: tuple[Callable[[int], list[Image]], ...] = (
        lambda n: [_plain(size, "black") for size in sizes],
        lambda n: [_plain(size, "white") for size in sizes],
        lambda n: [_places(size, round(255 * number / n)) for number, size in enumerate(sizes)],
    )
    try:
        made = [_pixels(prepare(paint(max(len(sizes) - 1, 1))), crops, holder) for paint in paints]
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError):  # the processor does not take them
        return None
    found = [_window(black, white, places, len(sizes) - 1) for black, white, places in zip(*made, strict=True)]
    windows = [window for window in found if window is not None]
    return windows if len(windows) == len(found) else None


def _plain(size: tuple[int, int], colour: str) -> Image:
    import PIL.Image

    return PIL.Image.new("RGB", size, colour)


def _places(size: tuple[int, int], blue: int) -> Image:
    """Red is how far to the right a pixel lies, green how far down; blue tells the images of a prompt apart."""
    import PIL.Image

    down = PIL.Image.linear_gradient("L")
    right = down.transpose(PIL.Image.Transpose.TRANSPOSE)
    return PIL.Image.merge("RGB", (right.resize(size), down.resize(size), PIL.Image.new("L", size, blue)))


def _pixels(inputs: Mapping[str, Any], crops: Sequence[int], holder: Images | None) -> list[Tensor]:
    """All crops, float (3, H, W) each. Raises ValueError where they do not lie so."""
    made = _crops(inputs, crops, holder)
    if len(made) != sum(crops) or any(one.ndim != 3 or one.shape[0] != 3 for one in made):
        raise ValueError("the pixels of each crop cannot be told apart")
    return made


def _crops(inputs: Mapping[str, Any], crops: Sequence[int], holder: Images | None) -> list[Tensor]:
    if holder is not None and holder.cell is not None:
        return [crop for one in holder.unpack("image", inputs) for crop in one[:, 0]]
    pixels = inputs[PIXELS["image"]]
    if pixels.ndim == 5 and len(pixels) == len(crops):  # those with fewer crops are filled up
        return [crop for one, count in zip(pixels, crops, strict=True) for crop in one[:count]]
    return list(pixels.flatten(0, -4))


def _window(black: Tensor, white: Tensor, places: Tensor, last: int) -> Window | None:
    """Of one crop; float (3, H, W) each. last: the number of the last image."""
    if not black.shape == white.shape == places.shape:
        return None
    black, white, places = black.float(), white.float(), places.float()
    spread = white - black
    shown = (spread.abs() > 0.5 * spread.abs().max()).all(0)
    if not bool(shown.any()):
        return None
    values = (places - black) / torch.where(shown, spread, 1)
    across, down = _line(values[0], shown), _line(values[1].T, shown.T)
    if across is None or down is None:
        return None
    return Window(round(float(values[2][shown].mean()) * last), Box(across[0], down[0], across[1], down[1]))


def _line(values: Tensor, shown: Tensor) -> tuple[float, float] | None:
    """What the first and the last edge of the columns show, from `values` in [0, 1] of the pixels that are shown."""
    counts = shown.sum(0)
    columns = (counts * 2 > counts.max()).nonzero()[:, 0]
    if len(columns) > 8:
        columns = columns[2:-2]  # where an image meets its padding, both are mixed
    if len(columns) < 2:
        return None
    means = ((values * shown).sum(0) / counts.clamp_min(1))[columns]
    at = (columns + 0.5) / values.shape[1]
    slope = ((at - at.mean()) * (means - means.mean())).sum() / ((at - at.mean()) ** 2).sum()
    start = means.mean() - slope * at.mean()
    if not bool(slope > 0) or bool((start + slope * at - means).abs().max() > STRAIGHT):
        return None
    return _snapped(float(start)), _snapped(float(start + slope))


def _snapped(edge: float) -> float:
    near = round(edge)
    return float(near) if abs(edge - near) < SNAP else edge
