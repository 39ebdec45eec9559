"""The decoder layers of one pipeline as bars: how many visual tokens enter each, and which do not simply run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from prunekit.trace.colours import BAR, PALE, RULE, SKIPPED
from prunekit.trace.figure import Layer
from prunekit.trace.pieces import Piece, stack, text

if TYPE_CHECKING:
    from PIL.Image import Image

HEIGHT = 46
RUN = "run"


def summary(layers: Sequence[Layer]) -> str:
    """`layers: 11 run, skip 7`; what only one phase does says which."""
    named: dict[str, list[int]] = {}
    for layer in layers:
        if layer.prefill != RUN:
            named.setdefault(layer.prefill, []).append(layer.number)
        elif layer.decode != RUN:
            named.setdefault(f"{layer.decode} in decoding", []).append(layer.number)
    rest = [f"{action.replace('_', ' ')} {', '.join(map(str, numbers))}" for action, numbers in named.items()]
    run = sum(layer.prefill == RUN for layer in layers)
    return f"layers: {', '.join([f'{run} run', *rest])}"


def bars(layers: Sequence[Layer], original: int, width: int) -> Piece:
    """With words. original: visual tokens of the sample, which fill the height."""
    words = [text(summary(layers), width, 12, most=3)]
    under = text(f"visual tokens entering layers 0 to {len(layers) - 1}", width, 12, PALE)
    return stack([*words, plain(layers, original, width), under], 4)


def plain(layers: Sequence[Layer], original: int, width: int) -> Piece:
    """The bars alone."""
    step = width / max(len(layers), 1)
    gap = 2 if step >= 6 else 1 if step >= 3 else 0

    def paint(image: Image, x: int, y: int) -> None:
        from PIL import ImageDraw

        draw = ImageDraw.Draw(image)
        bottom = y + HEIGHT - 1
        draw.line([(x, bottom + 1), (x + width - 1, bottom + 1)], fill=RULE)
        for layer in layers:
            left, right = x + round(layer.number * step), x + round((layer.number + 1) * step) - 1 - gap
            top = bottom - round((HEIGHT - 1) * layer.visual / max(original, 1))
            if layer.prefill == RUN:
                draw.rectangle((left, top, right, bottom), fill=BAR)
                continue
            draw.rectangle((left, min(top, bottom - 8), right, bottom), outline=SKIPPED, width=1)
            draw.line([(left, bottom), (right, min(top, bottom - 8))], fill=SKIPPED)

    return Piece(width, HEIGHT + 2, paint)
