"""Letters for signs: one small sheet that ships, drawn once, so that a word is the same pixels on every machine."""

from __future__ import annotations

import functools
import string
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SHEET = Path(__file__).resolve().parent / "icons" / "letters.png"
WIDTH, HEIGHT = 20, 24  # pixels of a cell; one row of 26 capitals


def render_letters(out: Path = SHEET) -> None:
    """Draw the capitals with Pillow's own font (Aileron, CC0), thickened, each in the middle of its cell."""
    font = ImageFont.load_default(27)
    sheet = Image.new("L", (26 * WIDTH, HEIGHT))
    for i, letter in enumerate(string.ascii_uppercase):
        cell = Image.new("L", (WIDTH, HEIGHT))
        at = (WIDTH / 2, HEIGHT / 2 + 10)
        ImageDraw.Draw(cell).text(at, letter, fill=255, font=font, anchor="ms", stroke_width=1)
        sheet.paste(cell, (i * WIDTH, 0))
    sheet.save(out, optimize=True)


@functools.cache
def _sheet() -> Image.Image:
    return Image.open(SHEET).convert("L")


@functools.cache
def ink(word: str, height: int) -> np.ndarray:
    """How much of each pixel the letters of a word cover; float32 `[height, width]` in 0..1."""
    strip = Image.new("L", (len(word) * WIDTH, HEIGHT))
    for i, letter in enumerate(word.upper()):
        x = string.ascii_uppercase.index(letter) * WIDTH
        strip.paste(_sheet().crop((x, 0, x + WIDTH, HEIGHT)), (i * WIDTH, 0))
    width = round(strip.width * height / HEIGHT)
    return np.asarray(strip.resize((width, height), Image.BILINEAR), np.float32) / 255


if __name__ == "__main__":
    render_letters()
