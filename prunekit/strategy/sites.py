"""Where a stage acts (`Site`, `Sites`) and how many visual tokens it leaves (`Keep`)."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import total_ordering
from typing import Any, Literal, cast

from prunekit.errors import PluginError, did_you_mean
from prunekit.strategy import meant
from prunekit.strategy.functions import unfit

# The order in which the data passes the places.
PLACES = ("pixels", "vision", "encoder", "layer", "prefill_end")
Point = Literal["before", "mid", "after"]
POINTS: tuple[Point, ...] = ("before", "mid", "after")
WRITTEN = re.compile(r"(?P<tower>vision\.)?(?P<number>\d+)(\.(?P<point>mid|after))?")
USE = "use 'encoder' (the decoder input) or a layer number such as 2"
# How `Sites` allows a place.
ALLOWED_BY = {"pixels": "pixels", "vision": "tower", "encoder": "encoder", "layer": "decoder", "prefill_end": "end"}


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

    `Site(2)` is before decoder layer 2, `Site(2, "layer", "after")` after it, `Site(None)` the encoder. Raises
    ValueError, naming the nearest right one, for what is no layer, place or point, and for those that do not go
    together.
    """

    layer: int | None
    place: Literal["", "pixels", "vision", "encoder", "layer", "prefill_end"] = ""
    point: Point = "before"

    def __post_init__(self) -> None:
        place = self.place or ("encoder" if self.layer is None else "layer")
        if problem := _site_problem(self.layer, place, self.point):
            plain = not self.place and self.point == "before"
            told = f"{self.layer!r}" if plain else f"{self.layer!r}, {place!r}, {self.point!r}"
            raise ValueError(f"Site({told}): {problem}")
        if not self.place:
            object.__setattr__(self, "place", place)

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


def _site_problem(layer: Any, place: Any, point: Any) -> str:
    """Why these are no site, and what is the nearest; empty: they are one."""
    if layer is not None and (not isinstance(layer, int) or isinstance(layer, bool) or layer < 0):
        hint = _read_as(layer)
        return "layers are whole numbers from 0" + f" ({hint})" * bool(hint)
    for value, listed, what in ((place, PLACES, "place"), (point, POINTS, "point")):
        if value not in listed:
            near = did_you_mean(value, listed) if isinstance(value, str) else ""
            if what == "place" and value in POINTS and layer is not None:
                near = f"write Site({layer}, 'layer', {value!r}), or Site.parse('{Site(layer, 'layer', value)}'); "
            return f"{value!r} is no {what}; {near}it is {', '.join(map(repr, listed[:-1]))} or {listed[-1]!r}"
    if place == "vision" and (layer is None or point == "before"):
        return f"in the tower a site is 'mid' or 'after' a block (write Site.parse('vision.{layer or 0}'))"
    if place == "layer" and layer is None:
        return "a site at a layer has its number (write Site(2))"
    if place not in ("layer", "vision") and (layer is not None or point != "before"):
        return f"'{place}' has neither layers nor points (write Site(None, '{place}'))"
    return ""


def _read_as(layer: object) -> str:
    """A hint for what stands where a number belongs: a site as a pipeline file has it, or nearly one."""
    try:
        Site.parse(layer)
    except ValueError:
        near = meant.site(layer)
        return f"write Site({near.removeprefix('write ')})" if near.startswith("write ") else near
    return f"write Site.parse({layer!r})"


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
        """Raises ValueError, saying what to write, for a default that is neither a site nor a function, for points and
        layers that there are not, and for a default that is not allowed.
        """
        points = self.points if isinstance(self.points, tuple) else ()
        if not points or not all(point in POINTS for point in points):
            strange = [one for one in points if isinstance(one, str) and one not in POINTS]
            near = did_you_mean(strange[0], POINTS) if strange else ""
            raise ValueError(f"Sites(points={self.points!r}): {near}it is a tuple of {', '.join(map(repr, POINTS))}")
        if isinstance(self.lowest, bool) or not isinstance(self.lowest, int) or self.lowest < 0:
            raise ValueError(f"Sites(lowest={self.lowest!r}): it is the number of a decoder layer, from 0")
        for name in ("encoder", "decoder", "tower", "end", "pixels"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"Sites({name}={getattr(self, name)!r}): it is True or False")
        if problem := self._default_problem():
            raise ValueError(f"Sites(default={self.default!r}): {problem}")

    def _default_problem(self) -> str:
        """Why `default` is none; empty: it is one. The decoder input is also what stands for no default."""
        default: Any = self.default
        if isinstance(default, Site):
            if default == ENCODER or not (reason := self.reason_against(default)):
                return ""
            keyword = ALLOWED_BY[default.place]
            return f"'{default}' is not allowed: it {reason}" + f" (say {keyword}=True)" * (not getattr(self, keyword))
        if callable(default):
            return unfit(default, ("the number of decoder layers",))
        if isinstance(default, list | tuple | set | Mapping):
            return f"it takes one Site; {SEVERAL}"
        number = isinstance(default, int) and not isinstance(default, bool) and default >= 0
        hint = f"write Sites(default=Site({default}))" if number else _read_as(default)
        written = hint.startswith("write Site")
        return f"it takes a Site, or a function from the number of layers to one{f' ({hint})' if written else ''}"

    def resolve(self, layers: int) -> Site:
        """The default site for a decoder of `layers` layers. Raises PluginError where the function fails,
        or gives another.
        """
        if isinstance(self.default, Site):
            return self.default
        try:
            site = self.default(layers)
        except Exception as error:
            raise PluginError(f"the function Sites(default=...) failed with {type(error).__name__}: {error}") from error
        if not isinstance(site, Site):
            raise PluginError(f"the function Sites(default=...) gave {site!r}; it gives one Site, and {SEVERAL}")
        return site

    def reason_against(self, site: Site) -> str | None:
        """Why `site` is not allowed, or None if it is."""
        allowed = {place: getattr(self, keyword) for place, keyword in ALLOWED_BY.items()}
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
