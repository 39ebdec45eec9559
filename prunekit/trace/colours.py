"""The colours of keep maps: told apart by people who see no red or no green, and in grey by texture and brightness."""

from __future__ import annotations

from prunekit.trace.fates import Fate

RGB = tuple[int, int, int]

INK, PALE, PAPER, RULE = (31, 35, 40), (101, 109, 118), (255, 255, 255), (208, 215, 222)
NIGHT = (18, 24, 38)  # what lies over tokens that are no longer there
MARK, JOIN = (230, 120, 40), (86, 180, 233)  # of dropped ones, and of merged ones and what they join
# How much of the image each fate covers, from 0 to 1.
COVER = {Fate.KEPT: 0.0, Fate.MERGED: 0.5, Fate.DROPPED: 0.72, Fate.GONE: 0.9}
BAR, SKIPPED = (0, 114, 178), (213, 94, 0)  # layers that run, and those that do not simply run
UNSCORED = (140, 140, 140)
# Viridis at equal distances: brighter is higher, for every eye and in grey.
_HEAT: tuple[RGB, ...] = (
    (68, 1, 84), (72, 40, 120), (62, 74, 137), (49, 104, 142), (38, 130, 142), (31, 158, 137), (53, 183, 121),
    (109, 205, 89), (180, 222, 44), (253, 231, 37),
)  # fmt: skip


def heat(rank: float) -> RGB:
    """The colour of a score by its rank, 0 the lowest and 1 the highest."""
    place = min(max(rank, 0.0), 1.0) * (len(_HEAT) - 1)
    low = min(int(place), len(_HEAT) - 2)
    part = place - low
    red, green, blue = (round(a + (b - a) * part) for a, b in zip(_HEAT[low], _HEAT[low + 1], strict=True))
    return red, green, blue


def mixed(below: RGB, above: RGB, part: float) -> RGB:
    """`above` with opacity `part` over `below`."""
    red, green, blue = (round(a + (b - a) * part) for a, b in zip(below, above, strict=True))
    return red, green, blue


def code(colour: RGB) -> str:
    """For HTML."""
    return "#{:02x}{:02x}{:02x}".format(*colour)
