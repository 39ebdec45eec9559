"""What a strategy may request of the decoder, and which of its layers a request means.

    @strategy(inputs={"attention": Rows(layer="next", queries="text", rope=False), "keys": Keys(heads="mean")})

An argument that a hook names without a request takes the default one. A tuple of requests gives the hook a tuple of
tensors, in that order.

Shape letters: B batch, S sequence, V visual tokens, T text tokens, H hidden, A heads, A_kv key and value heads, Q query
rows, D numbers of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from prunekit.strategy.functions import unfit
from prunekit.strategy.sites import Site

if TYPE_CHECKING:
    from torch import Tensor

Where = Literal["previous", "next", "own"]
Queries = Literal["last", "text", "after", "visual", "all"]
Reduction = Literal["mean", "sum", "max", "none"]
States = Literal["concat", "mean", "none"]
Domain = Literal["softmax", "visual", "queries", "logits"]


@dataclass(frozen=True)
class PromptTokens:
    """What is known of a prompt batch when its prefill begins, for `Rows(queries=callable)`. All tokens, with padding.

    ids: int64 (B, S).
    embeds: float (B, S, H), what enters the decoder: text embeddings, and image features in the places of the visual
        tokens.
    valid: bool (B, S), not padding. visual, text: bool (B, S), the valid tokens that are, and are not, visual.
    after: bool (B, S), text behind the row's last visual token; all text of a row without one.
    """

    ids: Tensor
    embeds: Tensor
    valid: Tensor
    visual: Tensor
    text: Tensor
    after: Tensor


@dataclass(frozen=True)
class Rows:
    """Which attention rows the input `attention` holds, cut to the visual columns: float (B, V) unless said otherwise.

    layer: `previous` is the layer that ran just before the site, on the tokens that it ran on; `next` looks ahead to
        the layer that is about to run, on the tokens that reach the site; `own` is the layer that the site `N.mid` or
        `N.after` stands in.
    queries: the tokens whose rows are taken: `last`, the last prompt token of each sample; `text`, all text; `after`,
        the text behind the last visual token; `visual`; `all`; or a function from `PromptTokens` to bool (B, S).
        Tokens that are not there any more are left out; a sample without any gets zeros.
    heads: how the A heads become one, before the queries do; a number h takes the mean of the h heads with the largest
        sum over queries and visual columns, lower head first on ties; a fraction in (0, 1) such a part of the heads,
        rounded half up, at least 1; `none` keeps them: float (B, V, A).
    over: how the query rows become one; `none` keeps them, (B, V, Q) or (B, V, A, Q), in the order of the prompt, with
        zeros behind the rows of samples that have fewer. Only this asks for memory that grows with both.
    rope: False takes queries and keys as they are before rotation.
    domain: `softmax` is over all keys that a query sees, as the layer computes it; `visual` over those that are visual,
        `queries` over those of the tokens whose rows are asked for, zeros where it sees none; `logits` are the scaled
        products before softmax and without the mask.
    undecay: True divides each probability, before heads and queries become one, by what rotation alone leaves of a
        product at the distance of query and key: the mean of cos(distance * frequency), 1 at distance 0, taken as 0.1
        where it is less. It undoes the preference of rotary positions for near tokens (SparseVLM "+",
        https://arxiv.org/abs/2410.04417).
    pooled: True takes one row, of the mean of the queries, in place of theirs; it sees every key that one of them
        sees (PACT, https://arxiv.org/abs/2504.08966).
    temperature: what logits, with what their mask adds, are divided by before softmax.
    steps: how often attention is passed on. From the second step on all rows are summed up again, each weighted by what
        its own token has received, head by head: n steps of PageRank (AIM, https://arxiv.org/abs/2412.03248). Above 1
        it takes queries="all" and over="mean", which begins with equal weights, and no number of heads.
    optional: at sites where there is no such layer, as in front of the decoder, the hook gets None in place of the
        rows; False: such a site is refused.
    """

    layer: Where = "previous"
    queries: Queries | Callable[[PromptTokens], Tensor] = "last"
    heads: Reduction | int | float = "mean"
    over: Reduction = "mean"
    rope: bool = True
    domain: Domain = "softmax"
    undecay: bool = False
    pooled: bool = False
    temperature: float = 1.0
    steps: int = 1
    optional: bool = False

    def heads_of(self, heads: int) -> int | None:
        """How many of so many heads are taken; None where all are."""
        if isinstance(self.heads, str):
            return None
        return self.heads if isinstance(self.heads, int) else max(math.floor(self.heads * heads + 0.5), 1)

    def __post_init__(self) -> None:
        """Raises ValueError for rows that do not exist, rather than giving others."""
        _one_of("layer", self.layer, Where)
        if not callable(self.queries):
            _one_of("queries", self.queries, Queries)
        elif wrong := unfit(self.queries, ("PromptTokens",)):
            raise ValueError(f"queries: {wrong}")
        if isinstance(self.heads, bool) or not isinstance(self.heads, int | float):
            _one_of("heads", self.heads, Reduction)
        elif not (self.heads >= 1 if isinstance(self.heads, int) else 0 < self.heads < 1):
            wanted = "as a number it says how many heads to take, at least 1, or which part of them, below 1"
            raise ValueError(f"heads is {self.heads}; {wanted}")
        _one_of("over", self.over, Reduction)
        _one_of("domain", self.domain, Domain)
        _boolean("rope", self.rope)
        _boolean("undecay", self.undecay)
        _boolean("optional", self.optional)
        if self.undecay and (self.domain == "logits" or not self.rope):
            raise ValueError("undecay is of probabilities from rotated queries and keys: not with rope=False or logits")
        self._check_ways()

    def _check_ways(self) -> None:
        """Of pooled queries, temperatures and steps."""
        _boolean("pooled", self.pooled)
        if self.pooled and (self.undecay or self.over != "mean" or self.steps != 1):
            raise ValueError("pooled takes one row, which stands nowhere: not with undecay, steps or another over")
        if isinstance(self.temperature, bool) or not isinstance(self.temperature, int | float) or self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature!r}; it is a number above 0")
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"steps is {self.steps!r}; it is a whole number, at least 1")
        if self.domain == "logits" and (self.temperature != 1 or self.steps > 1):
            raise ValueError("temperature and steps are of probabilities: not with domain='logits'")
        plain = self.queries == "all" and self.over == "mean" and isinstance(self.heads, str) and not self.undecay
        if self.steps > 1 and not plain:
            raise ValueError("steps above 1 take queries='all', over='mean', heads by name, and no undecay")


@dataclass(frozen=True)
class Keys:
    """Which keys the inputs `keys` and `text_keys` hold.

    layer, rope: as for `Rows`. heads: `concat` gives float (B, V, A_kv * D), `mean` float (B, V, D), `none` float (B,
    V, A_kv, D).
    """

    layer: Where = "previous"
    rope: bool = True
    heads: States = "concat"

    def __post_init__(self) -> None:
        _one_of("layer", self.layer, Where)
        _one_of("heads", self.heads, States)
        _boolean("rope", self.rope)


@dataclass(frozen=True)
class Values:
    """Which values the inputs `values` and `text_values` hold; fields as those of `Keys`."""

    layer: Where = "previous"
    heads: States = "concat"

    def __post_init__(self) -> None:
        _one_of("layer", self.layer, Where)
        _one_of("heads", self.heads, States)


Spec = Rows | Keys | Values


def layer_and_rope(spec: Spec) -> tuple[Where, bool]:
    """Which call of which layer a request reads; values are the same with and without rotation."""
    return spec.layer, isinstance(spec, Values) or spec.rope


def is_optional(spec: Spec) -> bool:
    """A site without the layer that it means gets None."""
    return isinstance(spec, Rows) and spec.optional


def layer_of(where: Where, site: Site, layers: int) -> int | None:
    """The decoder layer that `where` means at `site` in a decoder of so many layers; None: there is none."""
    if site.place == "prefill_end":
        return layers - 1 if where == "previous" else None
    if site.place == "encoder":
        return 0 if where == "next" else None
    if site.place != "layer" or site.layer is None:
        return None
    if where == "own":
        return None if site.point == "before" else site.layer
    ahead = site.layer + (site.point == "after")
    if where == "next":  # inside a layer, what enters the next one is not there yet
        return ahead if ahead < layers and site.point != "mid" else None
    return ahead - 1 if ahead else None


def layer_before(site: Site, layers: int) -> int | None:
    """The layer whose input is `previous_hidden` at `site`: the newest that has begun; None: there is none."""
    return layer_of("own" if site.point == "mid" else "previous", site, layers)


def _one_of(name: str, value: object, literal: object) -> None:
    if value not in get_args(literal):
        raise ValueError(f"{name} is {value!r}; it takes {', '.join(map(repr, get_args(literal)))}")


def _boolean(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}; it takes True or False")
