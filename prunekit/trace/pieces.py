"""Pieces of a drawing that know their size: text, columns and rows of others."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from prunekit.trace.colours import INK, RGB

if TYPE_CHECKING:
    from PIL.Image import Image

SPACING = 1.35  # of lines of text


@dataclass(frozen=True)
class Piece:
    """Width and height in pixels, and what paints it with its upper left corner at (x, y) of an image."""

    width: int
    height: int
    paint: Callable[[Image, int, int], None]


def blank(width: int, height: int) -> Piece:
    """Space."""
    return Piece(width, height, lambda image, x, y: None)


def stack(pieces: Sequence[Piece], gap: int = 6) -> Piece:
    """One below the other."""
    tops, top = [], 0
    for piece in pieces:
        tops.append(top)
        top += piece.height + gap

    def paint(image: Image, x: int, y: int) -> None:
        for piece, down in zip(pieces, tops, strict=True):
            piece.paint(image, x, y + down)

    return Piece(max((piece.width for piece in pieces), default=0), max(top - gap, 0), paint)


def row(pieces: Sequence[Piece], gap: int = 20) -> Piece:
    """Side by side."""
    lefts, left = [], 0
    for piece in pieces:
        lefts.append(left)
        left += piece.width + gap

    def paint(image: Image, x: int, y: int) -> None:
        for piece, across in zip(pieces, lefts, strict=True):
            piece.paint(image, x + across, y)

    return Piece(max(left - gap, 0), max((piece.height for piece in pieces), default=0), paint)


def flow(pieces: Sequence[Piece], columns: int, gap: int = 20) -> Piece:
    """In rows of so many."""
    rows = [row(pieces[start : start + columns], gap) for start in range(0, len(pieces), columns)]
    return stack(rows, gap)


def text(words: str, width: int, size: int = 13, colour: RGB = INK, most: int = 4) -> Piece:
    """Words in lines of at most `width` pixels, at most so many of them; what is cut off ends with an ellipsis."""
    from PIL import ImageDraw

    lines = _lines(words, width, size)
    if len(lines) > most:
        lines = [*lines[: most - 1], _cut(lines[most - 1] + " ", width, size, ended=True)]
    step = round(size * SPACING)

    def paint(image: Image, x: int, y: int) -> None:
        draw = ImageDraw.Draw(image)
        for number, line in enumerate(lines):
            draw.text((x, y + number * step), line, fill=colour, font=font(size))

    return Piece(width, step * len(lines), paint)


def label(words: str, size: int, colour: RGB = INK) -> Piece:
    """Words on one line, as wide as they are."""
    return text(words, math.ceil(font(size).getlength(words)) + 1, size, colour)


@cache
def font(size: int) -> Any:
    """The font that comes with Pillow."""
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _lines(words: str, width: int, size: int) -> list[str]:
    lines: list[str] = []
    for paragraph in words.splitlines() or [""]:
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}" if line else word
            if line and font(size).getlength(longer) > width:
                lines.append(line)
                longer = word
            line = longer if font(size).getlength(longer) <= width else _cut(longer, width, size)
        lines.append(line)
    return lines


def _cut(line: str, width: int, size: int, ended: bool = False) -> str:
    """A line that fits, with an ellipsis where something is missing."""
    while line and font(size).getlength(line + "…") > width:
        line, ended = line[:-1], True
    return f"{line.rstrip()}…" if ended else line
