"""Rectangles in an image, in fractions of its width and height."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Box:
    """left < right and top < bottom; beyond 0 and 1 lies what is no part of the image, such as padding."""

    left: float
    top: float
    right: float
    bottom: float

    def part(self, row: int, column: int, rows: int, columns: int) -> Box:
        """The cell of a grid that fills the box."""
        width, height = (self.right - self.left) / columns, (self.bottom - self.top) / rows
        left, top = self.left + column * width, self.top + row * height
        return Box(left, top, left + width, top + height)

    def scaled(self, width: float, height: float) -> tuple[float, float, float, float]:
        """left, top, right, bottom in an image of this size."""
        return self.left * width, self.top * height, self.right * width, self.bottom * height

    def overlaps(self, other: Box, slack: float = 0.02) -> bool:
        """Whether both share more than a thin strip."""
        across = min(self.right, other.right) - max(self.left, other.left)
        down = min(self.bottom, other.bottom) - max(self.top, other.top)
        return across > slack and down > slack


WHOLE = Box(0, 0, 1, 1)


def union(boxes: Sequence[Box]) -> Box:
    """The smallest box that holds all of them."""
    return Box(
        min(box.left for box in boxes), min(box.top for box in boxes),
        max(box.right for box in boxes), max(box.bottom for box in boxes),
    )  # fmt: skip
