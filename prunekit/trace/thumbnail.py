"""A pipeline's keep maps without words, small enough to stand in a table: its stages side by side, then its layers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from prunekit.errors import InputError
from prunekit.trace import layer_bars, maps
from prunekit.trace.colours import PAPER
from prunekit.trace.figure import Column, Figure
from prunekit.trace.pieces import Piece, row, stack

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE, GAP = 120, 4  # pixels
MOST = 4  # stages, and surfaces of one stage: an image of many tiles is its overview here
SUFFIX, QUALITY = ".webp", 70


def draw(figure: Figure, column: Column) -> Image:
    """The picture, RGB."""
    from PIL import Image as images

    whole = _piece(figure, column)
    image = images.new("RGB", (whole.width, whole.height), PAPER)
    whole.paint(image, 0, 0)
    return image


def save_thumbnails(figure: Figure, folder: Path) -> list[Path]:
    """Write a picture of each pipeline, named like it; returns the paths. Raises InputError where that cannot be."""
    written = []
    for column in figure.columns:
        path = folder / f"{column.report.pipeline}{SUFFIX}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            draw(figure, column).save(path, quality=QUALITY, method=6)
        except OSError as error:
            raise InputError(f"'{path}' cannot be written: {error.strerror or error} (name another folder)") from error
        written.append(path)
    return written


def _piece(figure: Figure, column: Column) -> Piece:
    """Of many stages the last ones, where most has been decided."""
    stages = column.stages[-MOST:]
    shown = figure.surfaces[-MOST:]
    side = SIDE if len(shown) == 1 else SIDE // 2
    cells = [
        row([maps.keep_map(surface, stage, maps.size_of(surface, side, side)) for surface in shown], GAP)
        for stage in (stages or (None,))
    ]
    held = row(cells, GAP)
    return stack([held, layer_bars.plain(column.layers, column.report.visual_tokens[figure.sample], SIDE)], GAP)
