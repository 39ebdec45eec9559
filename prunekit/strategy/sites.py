"""Where a stage acts (`Site`, `Sites`) and how many visual tokens it leaves (`Keep`)."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import total_ordering
from typing import Any, Literal, cast

from prunekit.errors import PluginError

# The order in which the data passes the places.
PLACES = ("pixels", "vision", "encoder", "layer", "prefill_end")
Point = Literal["before", "mid", "after"]
POINTS: tuple[Point, ...] = ("before", "mid", "after")
WRITTEN = re.compile(r"(?P<tower>vision\.)?(?P<number>\d+)(\.(?P<point>mid|after))?")
USE = "use 'encoder' (the decoder input) or a layer number such as 2"


@total_ordering
@dataclass(frozen=True)
class Site:
    """A place on the way of the data. Sites compare in the order in which the data passes them.

    | written | number, place, point | where |
    | --- | --- | --- |
    | `pixels` | None, pixels, before | images and videos, before the vision tower sees them |
    | `vision.3.mid`, `vision.3` | 3, vision, mid / after | tower: between attention and MLP of block 3, after it |
    | `encoder` | None, encoder, before | the decoder input |
    | `2`, `2.mid`, `2.after` | 2, layer, before / mid / after | before, inside (after attention), after layer 2 |
    | `prefill_end` | None, prefill_end, before | after the prefill; only the KV cache is cut |

    `Site(2)` is before decoder layer 2, `Site(None)` the encoder. Raises ValueError for a layer that is no whole number
    from 0, and for a tower site without its point.
    """

    layer: int | None
    place: Literal["", "pixels", "vision", "encoder", "layer", "prefill_end"] = ""
    point: Point = "before"

    def __post_init__(self) -> None:
        layer: Any = self.layer
        if layer is not None and (not isinstance(layer, int) or isinstance(layer, bool) or layer < 0):
            raise ValueError(f"Site({layer!r}): layers are whole numbers from 0 (Site.parse reads text)")
        if not self.place:
            object.__setattr__(self, "place", "encoder" if self.layer is None else "layer")
        if self.place == "vision" and (layer is None or self.point == "before"):
            raise ValueError(
                f"Site({layer}, 'vision', {self.point!r}): in the tower a site is 'mid' or 'after' a block"
            )

    @classmethod
    def parse(cls, text: object) -> Site:
        """Read a site from a pipeline file. Raises ValueError with the reason."""
        if isinstance(text, int) and not isinstance(text, bool) and text >= 0:
            return cls(text)
        if isinstance(text, str):
            if text in ("pixels", "encoder", "prefill_end"):
                return cls(None, cast("Any", text))
            if text == "decode":
                raise ValueError("site 'decode' is reserved: decoding steps see what prefill left")
            if written := WRITTEN.fullmatch(text):
                point = written["point"]
                if written["tower"] and point != "after":
                    return cls(int(written["number"]), "vision", cast("Any", point or "after"))
                if not written["tower"]:
                    return cls(int(written["number"]), "layer", cast("Any", point or "before"))
        raise ValueError(f"{text!r} is not a site; {USE}")

    def __lt__(self, other: Site) -> bool:
        return self._order < other._order

    @property
    def _order(self) -> tuple[int, int, int]:
        return PLACES.index(self.place), -1 if self.layer is None else self.layer, POINTS.index(self.point)

    @property
    def depth(self) -> int:
        """How many decoder layers have run completely before: -1 up to the encoder; at `prefill_end` beyond all."""
        if self.place == "layer" and self.layer is not None:
            return self.layer + (self.point == "after")
        return sys.maxsize if self.place == "prefill_end" else -1

    @property
    def reach(self) -> int:
        """How many decoder layers still write KV of the tokens that leave here."""
        return self.depth + 1 if self.point == "mid" and self.in_decoder else max(self.depth, 0)

    @property
    def in_decoder(self) -> bool:
        """Before, inside or after a decoder layer."""
        return self.place == "layer"

    @property
    def in_tower(self) -> bool:
        """Before the decoder input: `pixels` or inside the vision tower."""
        return self.place in ("pixels", "vision")

    def __str__(self) -> str:
        if self.place == "vision":
            return f"vision.{self.layer}" + ".mid" * (self.point == "mid")
        if self.place == "layer":
            return str(self.layer) + (f".{self.point}" if self.point != "before" else "")
        return self.place


PIXELS = Site(None, "pixels")
ENCODER = Site(None)
PREFILL_END = Site(None, "prefill_end")


SEVERAL = "several sites are a schedule: @strategy(schedule={Site(8): 0.5, Site(16): 0.25})"


@dataclass(frozen=True)
class Sites:
    """The sites that a token strategy allows, and the one it takes when the file names none.

    `default` may be a function of the number of decoder layers N, for defaults that scale with depth; several default
    sites with their budgets are a `schedule` of `@strategy`.
    encoder: the decoder input is allowed. lowest: the first decoder layer allowed; a strategy that reads the attention
    of the layer before says 1. decoder: sites before, inside and after decoder layers are allowed.
    tower: sites inside the vision tower are allowed. end: `prefill_end` is allowed. pixels: `pixels` is allowed.
    points: where around a decoder layer; a strategy that reads the layer which it stands in says ("mid", "after").
    """

    default: Site | Callable[[int], Site] = ENCODER
    encoder: bool = True
    lowest: int = 0
    decoder: bool = True
    tower: bool = False
    end: bool = False
    pixels: bool = False
    points: tuple[Point, ...] = POINTS

    def __post_init__(self) -> None:
        """Raises ValueError for a default that is neither a site nor a function, and for points that there are not."""
        if not self.points or not all(point in POINTS for point in self.points):
            raise ValueError(f"Sites(points={self.points!r}): it is a tuple of {', '.join(map(repr, POINTS))}")
        if not isinstance(self.default, Site) and not callable(self.default):
            raise ValueError(f"Sites(default={self.default!r}): it takes one Site, or a function of N; {SEVERAL}")

    def resolve(self, layers: int) -> Site:
        """The default site for a decoder of `layers` layers. Raises PluginError where the function gives another."""
        if isinstance(self.default, Site):
            return self.default
        site = self.default(layers)
        if not isinstance(site, Site):
            raise PluginError(f"the function Sites(default=...) gave {site!r}; it gives one Site, and {SEVERAL}")
        return site

    def reason_against(self, site: Site) -> str | None:
        """Why `site` is not allowed, or None if it is."""
        allowed = {
            "encoder": self.encoder, "vision": self.tower, "prefill_end": self.end, "layer": self.decoder,
            "pixels": self.pixels,
        }  # fmt: skip
        if not allowed[site.place]:
            layers = f"a decoder layer, {self.lowest} or later"
            names = {
                "pixels": "'pixels'", "vision": "a tower site", "encoder": "'encoder'", "layer": layers,
                "prefill_end": "'prefill_end'",
            }  # fmt: skip
            return f"needs {' or '.join(name for place, name in names.items() if allowed[place])}"
        if site.place == "layer" and site.depth < self.lowest:
            return f"needs layer {self.lowest} or later"
        if site.place == "layer" and site.point not in self.points:
            written = {"before": f"'{site.layer}'", "mid": f"'{site.layer}.mid'", "after": f"'{site.layer}.after'"}
            return f"needs another point of the layer: {' or '.join(written[point] for point in self.points)}"
        return None


@dataclass(frozen=True)
class Keep:
    """How many visual tokens a stage leaves of each sample: a fraction, or a number of tokens. Exactly one is set.

    A fraction is of the sample's original visual tokens, or with `of="current"` of those that reach the stage;
    it is rounded half up and is at least 1.
    cuts: how many cuts take equal parts of what has to go, from this one on; the last of them leaves the number itself.
    """

    fraction: float | None = None
    tokens: int | None = None
    of: Literal["original", "current"] = "original"
    cuts: int = 1

    def count(self, original: int, current: int) -> int:
        """Tokens to leave of a sample that had `original` visual tokens and has `current` of them here."""
        if current == 0:
            return 0
        return current - -(-(current - self._at_last(original, current)) // self.cuts)

    def _at_last(self, original: int, current: int) -> int:
        if self.tokens is not None:
            return min(self.tokens, current)
        base = original if self.of == "original" else current
        # 1e-9 keeps 0.07 * 100 = 7.000000000000001 and 0.29 * 50 = 14.499999999999998 on the side that was meant.
        wanted = math.floor(base * (self.fraction or 0.0) + 0.5 + 1e-9)
        return min(max(wanted, 1), current)

    def __str__(self) -> str:
        if self.tokens is not None:
            return f"{self.tokens} tokens"
        return f"{self.fraction:.4g} of {self.of}"
