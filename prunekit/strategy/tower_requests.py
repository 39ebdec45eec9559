"""What a strategy may request of the vision tower, and which of its blocks a request means.

    @strategy(inputs={"encoder_attention": EncoderRows(layer=0, heads="sum"), "encoder_keys": EncoderKeys()})

Blocks of the tower are counted from 0, or from the end with negative numbers: -1 is the last. `layer=None` is the block
that a tower site stands in or after; at `encoder` and in the decoder, the block whose output the projector gets,
which need not be the last. A function gets the number of the tower's blocks and returns one of these numbers, for a
block that follows the depth: `layer=lambda blocks: blocks // 3`.

Shape letters: B batch, V visual tokens, A heads of the tower, D numbers of a head, W width of the tower, H of the
decoder, E CLS tokens of a sample, one for each crop. Where several patches make one visual token, it gets their mean.
Visual tokens without a patch, such as newlines, and padding get zeros; so do patches that an earlier cut has dropped.
At a tower site B counts images and videos.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

from prunekit.strategy.functions import unfit
from prunekit.strategy.sites import Site

Block = int | Callable[[int], int] | None
Of = Literal["patches", "cls"]
POOL = "pool"  # the name of a query; strategies have such a name, too
Query = Literal["cls", "mean", "pool"]
Heads = Literal["mean", "sum", "none", "joined"]
Domain = Literal["softmax", "logits"]


@dataclass(frozen=True)
class EncoderRows:
    """Which attention the input `encoder_attention` holds: float (B, V), what each visual token receives.

    query: from whom. `cls`: the CLS token. `mean`: the mean over all tokens that see it, CLS among them: those of the
        same crop, in towers that attend in windows those of the same window. `pool`: the learned query of the pooling
        head behind the last block.
    heads: how the A heads become one. `none` keeps them, float (B, V, A). `joined` treats queries and keys of all heads
        as one long head with the scale that goes with its length; only for `cls`.
    domain: `softmax` over all tokens that the query sees, CLS among them, and not normalised again; `logits` are the
        scaled products before softmax and without a mask; only for `cls`.
    """

    layer: Block = None
    query: Query = "cls"
    heads: Heads = "mean"
    domain: Domain = "softmax"

    def __post_init__(self) -> None:
        """Raises ValueError for rows that do not exist, rather than giving others."""
        _layer(self.layer)
        _one_of("query", self.query, Query)
        _one_of("heads", self.heads, Heads)
        _one_of("domain", self.domain, Domain)
        if self.query != "cls" and (self.heads == "joined" or self.domain == "logits"):
            raise ValueError(f"heads='joined' and domain='logits' are for query='cls', not {self.query!r}")
        if self.query == POOL and self.layer is not None:
            raise ValueError("query='pool' is behind the last block: leave out layer")


@dataclass(frozen=True)
class _States:
    """Fields of `EncoderKeys`, `EncoderValues` and `EncoderQueries`.

    heads: `mean` gives float (B, V, D), `none` (B, V, A, D). of: `patches`, or `cls` for the CLS tokens, with E in the
    place of V.
    """

    layer: Block = None
    heads: Literal["mean", "none"] = "mean"
    of: Of = "patches"

    def __post_init__(self) -> None:
        """Raises ValueError for states that do not exist."""
        _layer(self.layer)
        _one_of("heads", self.heads, Literal["mean", "none"])
        _one_of("of", self.of, Of)


@dataclass(frozen=True)
class EncoderKeys(_States):
    """Which keys the input `encoder_keys` holds: as the block's attention computes them."""


@dataclass(frozen=True)
class EncoderValues(_States):
    """Which values the input `encoder_values` holds."""


@dataclass(frozen=True)
class EncoderQueries(_States):
    """Which queries the input `encoder_queries` holds."""


@dataclass(frozen=True)
class Features:
    """Which features the input `features` holds: float (B, V, W), the state after a block, before any final norm.

    projected: the image features as they came out of the encoder, float (B, V, H); newlines among them hold what they
    are. of: as for `EncoderKeys`.
    """

    layer: Block = None
    projected: bool = False
    of: Of = "patches"

    def __post_init__(self) -> None:
        """Raises ValueError for features that do not exist."""
        _layer(self.layer)
        _one_of("of", self.of, Of)
        if not isinstance(self.projected, bool):
            raise ValueError(f"projected is {self.projected!r}; it takes True or False")
        if self.projected and (self.layer is not None or self.of == "cls"):
            raise ValueError("projected features are those of the projector: leave out layer and of")


EncoderSpec = EncoderRows | EncoderKeys | EncoderValues | EncoderQueries | Features


def resolved(spec: EncoderSpec, site: Site, blocks: int, feature_block: int) -> EncoderSpec:
    """`spec` with the number of its block, from 0, in a tower of so many; None where it is of no block.

    What a function says is checked as the number itself would be, and may be beyond the tower.
    site: of the stage that asks. feature_block: the block whose output the projector gets.
    """
    if (isinstance(spec, Features) and spec.projected) or (isinstance(spec, EncoderRows) and spec.query == POOL):
        return spec
    layer = spec.layer(blocks) if callable(spec.layer) else spec.layer
    if layer is None:
        layer = site.layer if site.place == "vision" else feature_block
    assert layer is not None
    return replace(spec, layer=layer + blocks if layer < 0 else layer)


def _layer(value: object) -> None:
    if callable(value):
        if wrong := unfit(value, ("the number of tower blocks",)):
            raise ValueError(f"layer: {wrong}")
    elif value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise ValueError(f"layer is {value!r}; it takes the number of a tower block, a function of how many, or None")


def _one_of(name: str, value: object, literal: object) -> None:
    if value not in get_args(literal):
        raise ValueError(f"{name} is {value!r}; it takes {', '.join(map(repr, get_args(literal)))}")
