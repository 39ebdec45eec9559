"""Where a stage acts (`Site`, `Sites`) and how many visual tokens it leaves (`Keep`)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import total_ordering
from typing import Literal

# Site names of the full plan that this version does not run; they are refused by name, not as typing errors.
RESERVED = re.compile(r"pixels|vision\.\d+(\.mid)?|\d+\.(mid|after)|prefill_end|decode")


@total_ordering
@dataclass(frozen=True)
class Site:
    """A place on the way of the data: the decoder's door (`layer=None`, written `encoder`) or before a decoder layer.

    Sites compare in the order in which the data passes them.
    """

    layer: int | None

    @classmethod
    def parse(cls, text: object) -> Site:
        """Read `encoder` or a layer number from a pipeline file. Raises ValueError with the reason."""
        if text == "encoder":
            return ENCODER
        if isinstance(text, int) and not isinstance(text, bool) and text >= 0:
            return cls(text)
        if isinstance(text, str) and text.isdecimal():
            return cls(int(text))
        if isinstance(text, str) and RESERVED.fullmatch(text):
            raise ValueError(f"site '{text}' is reserved but not run by this version; use 'encoder' or a layer number")
        raise ValueError(f"{text!r} is not a site; use 'encoder' (the decoder's door) or a layer number such as 2")

    def __lt__(self, other: Site) -> bool:
        return self.depth < other.depth

    @property
    def depth(self) -> int:
        """-1 at the encoder, else the number of decoder layers that ran before."""
        return -1 if self.layer is None else self.layer

    def __str__(self) -> str:
        return "encoder" if self.layer is None else str(self.layer)


ENCODER = Site(None)


@dataclass(frozen=True)
class Sites:
    """The sites that a token strategy allows, and the one it takes when the file names none.

    `default` may be a callable from the number of decoder layers N to a site, for defaults that scale with depth.
    `lowest` is the first decoder layer allowed: a strategy that reads the attention of the layer before says 1.
    """

    default: Site | Callable[[int], Site] = ENCODER
    encoder: bool = True
    lowest: int = 0

    def resolve(self, layers: int) -> Site:
        """The default site for a decoder of `layers` layers."""
        return self.default(layers) if callable(self.default) else self.default

    def reason_against(self, site: Site) -> str | None:
        """Why `site` is not allowed, or None if it is."""
        if site.layer is None:
            return None if self.encoder else f"needs a decoder layer, {self.lowest} or later"
        return None if site.layer >= self.lowest else f"needs layer {self.lowest} or later"


@dataclass(frozen=True)
class Keep:
    """How many visual tokens a stage leaves of each sample: a fraction, or a number of tokens. Exactly one is set.

    A fraction is of the sample's original visual tokens, or with `of="current"` of those that reach the stage;
    it is rounded half up and is at least 1.
    """

    fraction: float | None = None
    tokens: int | None = None
    of: Literal["original", "current"] = "original"

    def count(self, original: int, current: int) -> int:
        """Tokens to leave of a sample that had `original` visual tokens and has `current` of them here."""
        if current == 0:
            return 0
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
