"""The images and videos of a prompt as the user gave them, with the tokens that show them.

A model may make one entry of each image, of each of its tiles, or of all images of a prompt together. What its
processor makes of test images tells which crop of which entry shows which image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Union

from prunekit.errors import InputError
from prunekit.families.images import Images
from prunekit.records import VisualTokens
from prunekit.trace.boxes import WHOLE, Box
from prunekit.trace.windows import Prepare, Window, windows_of

if TYPE_CHECKING:
    from PIL.Image import Image

Picture = Union["Image", Sequence["Image"]]  # a video is its frames
Row = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Exhibit:
    """One image or video with its tokens. frames: the image, or those of the video; empty: not at hand, or not known to
    be that. windows: what each crop of an image shows; None: not known.
    """

    tokens: VisualTokens
    frames: tuple[Image, ...] = ()
    windows: tuple[Box, ...] | None = None


def exhibits_of(
    inputs: Sequence[VisualTokens],
    pictures: Sequence[Picture],
    prepare: Prepare | None = None,
    holder: Images | None = None,
) -> tuple[Exhibit, ...]:
    """Those of one sample; inputs: the entries of its trace. pictures, prepare, holder: as `figure_of` takes them.

    Without pictures, or where they cannot be told apart, there is one for each entry.
    """
    if not pictures:
        return tuple(Exhibit(one, (), _alone(one)) for one in inputs)
    stills = [one for one in inputs if one.kind == "image"]
    videos = [one for one in inputs if one.kind == "video"]
    images = [(one,) for one in pictures if not isinstance(one, Sequence)]
    clips = [tuple(one) for one in pictures if isinstance(one, Sequence)]
    if len(clips) != len(videos) or not all(clips) or (bool(images) != bool(stills)):
        raise _mismatch(len(stills), len(videos), len(images), len(clips))
    shown = _images(stills, images, prepare, holder)
    if shown is None and prepare is None and len(stills) != len(images):
        raise _mismatch(len(stills), len(videos), len(images), len(clips))
    if shown is None:
        return (*(Exhibit(one, (), None) for one in stills), *map(Exhibit, videos, clips))
    rest, moving = iter(shown), iter(map(Exhibit, videos, clips))
    return tuple(next(moving) if isinstance(one, Sequence) else next(rest) for one in pictures)


def crop_count(tokens: VisualTokens) -> int:
    """How many crops or frames its coords name."""
    return 0 if not tokens.coords else max(place[0] for place in tokens.coords) + 1


def _alone(tokens: VisualTokens) -> tuple[Box, ...] | None:
    """Without an image to draw on, a single crop is all there is."""
    return (WHOLE,) if crop_count(tokens) == 1 else None


def _mismatch(stills: int, videos: int, images: int, clips: int) -> InputError:
    return InputError(
        f"the prompt shows {stills} images and {videos} videos, but {images} and {clips} are given to draw on (give "
        "those of one sample in the order of the prompt, a video as the list of its frames)"
    )


def _images(
    entries: Sequence[VisualTokens], images: Sequence[tuple[Image]], prepare: Prepare | None, holder: Images | None
) -> list[Exhibit] | None:
    """The images with their tokens; None where it is not known which crop shows which image."""
    one_each = len(entries) == len(images)
    if one_each and all(one.joined or one.coords is None for one in entries):
        return [Exhibit(one, image) for one, image in zip(entries, images, strict=True)]
    windows = None
    if prepare is not None and all(one.coords and not one.joined for one in entries):
        windows = windows_of([image.size for (image,) in images], list(map(crop_count, entries)), prepare, holder)
    if windows is not None and {window.picture for window in windows} == set(range(len(images))):
        return [_of_image(number, image, entries, windows) for number, image in enumerate(images)]
    return [Exhibit(one, image) for one, image in zip(entries, images, strict=True)] if one_each else None


def _of_image(number: int, image: tuple[Image], entries: Sequence[VisualTokens], windows: Sequence[Window]) -> Exhibit:
    """The crops of all entries that show one image, numbered anew."""
    ordinals: list[int] = []
    rows: list[Row] = []
    boxes: list[Box] = []
    first = 0
    for entry in entries:
        numbers = {}
        for crop in range(crop_count(entry)):
            if windows[first + crop].picture == number:
                numbers[crop] = len(boxes)
                boxes.append(windows[first + crop].box)
        for token, place in zip(entry.ordinals, entry.coords or (), strict=True):
            if place[0] in numbers:
                ordinals.append(token)
                rows.append((numbers[place[0]], *place[1:]))
        first += crop_count(entry)
    return Exhibit(VisualTokens("image", tuple(ordinals), tuple(rows)), image, tuple(boxes))
