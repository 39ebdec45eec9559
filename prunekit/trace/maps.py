"""Keep maps and heat maps of one surface, as pieces of a drawing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from prunekit.trace.boxes import Box
from prunekit.trace.colours import COVER, JOIN, MARK, NIGHT, PAPER, RULE, UNSCORED, heat, mixed
from prunekit.trace.fates import Fate, Scores, StageMap
from prunekit.trace.pieces import Piece
from prunekit.trace.surfaces import Surface

if TYPE_CHECKING:
    from PIL.Image import Image

PLAIN = (222, 227, 233)  # a kept token where there is no image to see
UNSEEN = 0.75  # how much of it is covered by paper where the model sees nothing of the image
HEATED = 0.78
TINY = 7  # cells smaller than this get no marks
Rectangle = tuple[int, int, int, int]  # left, top, right, bottom; right and bottom belong to it


def size_of(surface: Surface, width: int, height: int) -> tuple[int, int]:
    """Of a surface in at most `width` x `height` pixels."""
    scale = min(width / surface.aspect, height)
    return max(round(scale * surface.aspect), 8), max(round(scale), 8)


def keep_map(surface: Surface, stage: StageMap | None, size: tuple[int, int]) -> Piece:
    """What became of the tokens at a stage; None: the surface as the model sees it."""

    def paint(image: Image, x: int, y: int) -> None:
        image.paste(_kept(surface, stage, size), (x, y))

    return Piece(*size, paint)


def heat_map(surface: Surface, scores: Scores, stage: StageMap, size: tuple[int, int]) -> Piece:
    """The ranks of scores, with frames around kept tokens."""

    def paint(image: Image, x: int, y: int) -> None:
        image.paste(_heated(surface, scores, stage, size), (x, y))

    return Piece(*size, paint)


def swatch(fate: Fate, side: int) -> Piece:
    """How a token of this fate looks, for the legend."""
    cell = (1, 1, side - 2, side - 2)

    def paint(image: Image, x: int, y: int) -> None:
        from PIL import Image as images

        shown = images.new("RGB", (side, side), RULE)
        shown.paste(PLAIN, (1, 1, side - 1, side - 1))
        _cover(shown, cell, fate)
        _mark(shown, cell, fate)
        image.paste(shown, (x, y))

    return Piece(side, side, paint)


def rectangles(surface: Surface, size: tuple[int, int]) -> Iterator[tuple[int, Rectangle]]:
    """Each token with its cell in pixels, within the surface."""
    for cell in surface.cells:
        if (rectangle := _rectangle(cell.box, size)) is not None:
            yield cell.token, rectangle


def _rectangle(box: Box, size: tuple[int, int]) -> Rectangle | None:
    left, top, right, bottom = map(round, box.scaled(*size))
    left, top, right, bottom = max(left, 0), max(top, 0), min(right, size[0]) - 1, min(bottom, size[1]) - 1
    return (left, top, right, bottom) if left <= right and top <= bottom else None


def _base(surface: Surface, size: tuple[int, int]) -> tuple[Image, Image]:
    """The image as it is, and pale, as where no token shows it."""
    from PIL import Image as images

    if surface.picture is None:
        return images.new("RGB", size, PLAIN), images.new("RGB", size, PAPER)
    shown = surface.picture.convert("RGB").resize(size, images.Resampling.LANCZOS)
    return shown, images.blend(shown.convert("L").convert("RGB"), images.new("RGB", size, PAPER), UNSEEN)


def _kept(surface: Surface, stage: StageMap | None, size: tuple[int, int]) -> Image:
    from PIL import ImageDraw

    shown, image = _base(surface, size)
    cells = list(rectangles(surface, size))
    fates: Mapping[int, Fate] = {} if stage is None else stage.fates
    for token, cell in cells:
        left, top, right, bottom = cell
        image.paste(shown.crop((left, top, right + 1, bottom + 1)), (left, top))
        if (fate := fates.get(token, Fate.KEPT)) is not Fate.KEPT:
            _cover(image, cell, fate)
            _mark(image, cell, fate)
    draw = ImageDraw.Draw(image)
    for token, cell in cells:
        if stage is not None and token in stage.anchors:
            draw.rectangle(cell, outline=JOIN, width=max(1, min(3, _side(cell) // 7)))
        elif surface.picture is None:
            draw.rectangle(cell, outline=PAPER)
    return image


def _side(cell: Rectangle) -> int:
    return min(cell[2] - cell[0], cell[3] - cell[1]) + 1


def _cover(image: Image, cell: Rectangle, fate: Fate) -> None:
    from PIL import Image as images

    left, top, right, bottom = cell
    below = image.crop((left, top, right + 1, bottom + 1))
    image.paste(images.blend(below, images.new("RGB", below.size, NIGHT), COVER[fate]), (left, top))


def _mark(image: Image, cell: Rectangle, fate: Fate) -> None:
    """A cross on what was dropped, strokes on what was merged; cells that are too small differ by brightness alone."""
    from PIL import ImageDraw

    side = _side(cell)
    if side < TINY or fate not in (Fate.DROPPED, Fate.MERGED):
        return
    draw = ImageDraw.Draw(image)
    left, top, right, bottom = cell
    if fate is Fate.DROPPED:
        across, down, arm = (left + right) / 2, (top + bottom) / 2, max(side // 6, 2)
        for slope in (1, -1):
            ends = [(across - arm, down - slope * arm), (across + arm, down + slope * arm)]
            draw.line(ends, fill=MARK, width=1 + side // 20)
        return
    inset, width = max(side // 6, 1), 1 + side // 14
    for part in (0.5, 1.0):
        reach = (side - 1 - 2 * inset) * part
        draw.line([(left + inset, top + inset + reach), (left + inset + reach, top + inset)], fill=JOIN, width=width)


def _heated(surface: Surface, scores: Scores, stage: StageMap, size: tuple[int, int]) -> Image:
    from PIL import Image as images
    from PIL import ImageDraw

    shown, image = _base(surface, size)
    grey = shown.convert("L").convert("RGB")
    draw = ImageDraw.Draw(image)
    cells = list(rectangles(surface, size))
    for token, (left, top, right, bottom) in cells:
        rank = scores.ranks.get(token)
        below = grey.crop((left, top, right + 1, bottom + 1))
        colour = UNSCORED if rank is None else heat(rank)
        image.paste(images.blend(below, images.new("RGB", below.size, colour), HEATED), (left, top))
    for token, (left, top, right, bottom) in cells:
        if stage.fates[token] is Fate.KEPT and right - left >= 4:
            draw.rectangle((left, top, right, bottom), outline=mixed(PAPER, NIGHT, 0.02))
            draw.rectangle((left + 1, top + 1, right - 1, bottom - 1), outline=NIGHT)
    return image
