"""Where the visual tokens of an image or video are drawn: on the image, on copies of it for further crops, on frames.

Crops that lie beside each other, such as tiles, share one surface; those that show the same again, such as the whole
image at a lower resolution, get one of their own. What is not known is not drawn on the image, and says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prunekit.records import VisualTokens
from prunekit.trace.boxes import WHOLE, Box
from prunekit.trace.exhibits import Exhibit

if TYPE_CHECKING:
    from PIL.Image import Image

LOST = "which part of the images each crop shows is not known: tokens are drawn as a grid, not on the images"
FRAMES = "frames are drawn as if the processor showed all of each"


@dataclass(frozen=True)
class Cell:
    """A visual token, by its number among the sample's original ones, and the box that it covers on its surface."""

    token: int
    box: Box


@dataclass(frozen=True, eq=False)
class Surface:
    """Something to draw cells on. picture: what lies below them; None: nothing, as where they lie is not known.

    input: the number of the image or video in the prompt. aspect: width over height.
    """

    title: str
    input: int
    picture: Image | None
    cells: tuple[Cell, ...]
    aspect: float


@dataclass(frozen=True, eq=False)
class Placed:
    """The surfaces of one image or video. separators: its tokens that show nothing. note: what is not known; or empty.

    on_image: boxes are fractions of the image, or frame.
    """

    surfaces: tuple[Surface, ...]
    separators: tuple[int, ...] = ()
    note: str = ""
    on_image: bool = True


def placed(exhibit: Exhibit, number: int, title: str) -> Placed:
    """The surfaces of image or video `number` of a prompt."""
    tokens, pictures, windows = exhibit.tokens, exhibit.frames, exhibit.windows
    if tokens.coords is None:
        return Placed((_in_order(tokens, number, title),), (), tokens.unknown, False)
    rows = zip(tokens.ordinals, tokens.coords, strict=True)
    apart = tuple(token for token, place in rows if place[1] < 0)
    if tokens.kind == "video":
        return Placed(_frames(tokens, number, pictures, title), apart, FRAMES if pictures else "")
    if tokens.joined:
        return Placed(_joined(tokens, number, pictures, title), apart)
    if windows is None:
        return Placed(_each(tokens, number, title), apart, LOST, False)
    return Placed(_windowed(tokens, number, pictures, windows, title), apart)


def _crops(tokens: VisualTokens) -> list[int]:
    return sorted({place[0] for place in tokens.coords or ()})


def _cells(tokens: VisualTokens, crops: Sequence[int], box: Box = WHOLE, whole: bool = False) -> tuple[Cell, ...]:
    """The tokens of these crops in the grid of their crop, which fills `box`; whole: in that of the complete image."""
    rows = zip(tokens.ordinals, tokens.coords or (), strict=True)
    mine = [(token, place[5:] if whole else place[1:5]) for token, place in rows if place[0] in crops]
    return tuple(Cell(token, box.part(*place)) for token, place in mine if place[0] >= 0)


def _aspect(tokens: VisualTokens, crop: int, whole: bool = False) -> float:
    """Of the grid of a crop, if its cells are squares."""
    place = next(place for place in tokens.coords or () if place[0] == crop)
    rows, columns = place[7:] if whole else place[3:5]
    return max(columns, 1) / max(rows, 1)


def _shown(pictures: Sequence[Image], aspect: float) -> tuple[Image | None, float]:
    return (pictures[0], pictures[0].width / pictures[0].height) if pictures else (None, aspect)


def _joined(tokens: VisualTokens, number: int, pictures: Sequence[Image], title: str) -> tuple[Surface, ...]:
    """The whole image first, then its tiles in their common grid, which fills the image."""
    surfaces = []
    crops = _crops(tokens)
    for name, mine in (("whole", crops[:1]), ("tiles", crops[1:])):
        if mine:
            picture, aspect = _shown(pictures, _aspect(tokens, mine[0], whole=True))
            named = f"{title}, {name}" if len(crops) > 1 else title
            surfaces.append(Surface(named, number, picture, _cells(tokens, mine, whole=True), aspect))
    return tuple(surfaces)


def _windowed(
    tokens: VisualTokens, number: int, pictures: Sequence[Image], windows: Sequence[Box], title: str
) -> tuple[Surface, ...]:
    layers: list[list[int]] = []
    for crop in _crops(tokens):
        free = (one for one in layers if not any(windows[crop].overlaps(windows[other]) for other in one))
        layer = next(free, None)
        if layer is None:
            layers.append([crop])
        else:
            layer.append(crop)
    picture, aspect = _shown(pictures, _aspect(tokens, layers[0][0]))
    surfaces = []
    for layer in layers:
        cells = tuple(cell for crop in layer for cell in _cells(tokens, (crop,), windows[crop]))
        name = "" if len(layers) == 1 else ", tiles" if len(layer) > 1 else ", whole"
        surfaces.append(Surface(title + name, number, picture, cells, aspect))
    return tuple(surfaces)


def _each(tokens: VisualTokens, number: int, title: str) -> tuple[Surface, ...]:
    """A surface for each crop, without the image."""
    crops = _crops(tokens)
    names = [f"{title}, crop {crop}" if len(crops) > 1 else title for crop in crops]
    return tuple(
        Surface(name, number, None, _cells(tokens, (crop,)), _aspect(tokens, crop))
        for name, crop in zip(names, crops, strict=True)
    )


def _frames(tokens: VisualTokens, number: int, pictures: Sequence[Image], title: str) -> tuple[Surface, ...]:
    """A surface for each frame; where the tower takes several frames together, the first of them is shown."""
    frames, surfaces = _crops(tokens), []
    for frame in frames:
        mine = pictures[frame * len(pictures) // len(frames) :][:1]
        picture, aspect = _shown(mine, _aspect(tokens, frame))
        surfaces.append(Surface(f"{title}, frame {frame}", number, picture, _cells(tokens, (frame,)), aspect))
    return tuple(surfaces)


def _in_order(tokens: VisualTokens, number: int, title: str) -> Surface:
    """Tokens whose places are not known, line by line in the order of the prompt."""
    columns = math.ceil(math.sqrt(len(tokens.ordinals)))
    rows = math.ceil(len(tokens.ordinals) / columns)
    parts = [WHOLE.part(n // columns, n % columns, rows, columns) for n in range(len(tokens.ordinals))]
    cells = tuple(Cell(token, box) for token, box in zip(tokens.ordinals, parts, strict=True))
    return Surface(f"{title}, in the order of the prompt", number, None, cells, columns / rows)
