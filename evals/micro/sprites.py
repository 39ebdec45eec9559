"""Icons: one grey sprite per noun in a small sheet that ships, tinted on demand."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from prunekit_evals.micro.lexicon import COLORS, NOUNS, THEMES

SHEET = Path(__file__).resolve().parent / "icons" / "sheet.png"
CELL = 48  # pixels; the sheet is 8 cells wide
COLUMNS = 8


def render_sheet(font_path: str, out: Path = SHEET) -> None:
    """Draw every noun's glyph with a color-bitmap emoji font (size 109) into the sheet, as grey + alpha."""
    font = ImageFont.truetype(font_path, 109)
    rows = -(-len(NOUNS) // COLUMNS)
    sheet = Image.new("LA", (COLUMNS * CELL, rows * CELL))
    glyphs = {noun: glyph for nouns in THEMES.values() for noun, glyph in nouns.items()}
    for i, noun in enumerate(NOUNS):
        canvas = Image.new("RGBA", (160, 160))
        ImageDraw.Draw(canvas).text((12, 12), glyphs[noun], font=font, embedded_color=True)
        box = canvas.getbbox()
        if box is None:
            raise ValueError(f"the font has no glyph for {noun!r}")
        icon = canvas.crop(box)
        scale = CELL / max(icon.size)
        icon = icon.resize((max(1, round(icon.width * scale)), max(1, round(icon.height * scale))), Image.LANCZOS)
        x, y = (i % COLUMNS) * CELL, (i // COLUMNS) * CELL
        sheet.paste(_grey(icon), (x + (CELL - icon.width) // 2, y + (CELL - icon.height) // 2))
    sheet.save(out, optimize=True)


def _grey(icon: Image.Image) -> Image.Image:
    """Luminance stretched to 70..255, so that a tint shows on dark icons too."""
    rgba = np.asarray(icon, np.float32)
    alpha = rgba[..., 3]
    grey = rgba[..., :3] @ np.array([0.3, 0.59, 0.11], np.float32)
    low, high = np.percentile(grey[alpha > 128], [2, 98])
    grey = 70 + 185 * np.clip((grey - low) / max(high - low, 1.0), 0, 1)
    return Image.fromarray(np.stack([grey, alpha], -1).astype(np.uint8), "LA")


@functools.cache
def _sheet() -> Image.Image:
    return Image.open(SHEET).convert("LA")


@functools.cache
def sprite(noun: str, color: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The tinted icon as premultiplied color and transparency.

    Returns `(color, keep)`: float32 `[size, size, 3]` in 0..255 times alpha, and `[size, size, 1]`,
    the share of the background that stays visible.
    """
    i = NOUNS.index(noun)
    x, y = (i % COLUMNS) * CELL, (i // COLUMNS) * CELL
    cell = _sheet().crop((x, y, x + CELL, y + CELL)).resize((size, size), Image.BILINEAR)
    grey, alpha = np.moveaxis(np.asarray(cell, np.float32) / 255, -1, 0)
    tint = np.array(COLORS[color], np.float32)
    return (grey * alpha)[..., None] * tint, 1 - alpha[..., None]


if __name__ == "__main__":
    import sys

    render_sheet(sys.argv[1])
