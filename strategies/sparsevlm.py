"""SparseVLM (https://arxiv.org/abs/2410.04417, ICML 2025): the words that are about the image rate its tokens.

Raters: text tokens t behind the image with r_t = mean_v softmax_t(e_v . e_t) above the mean of r, of the embeddings e
that enter the decoder. score_i = mean over raters and heads of their attention to i in the layer that has just run.
v1.5 keeps the K best, and clusters the best floor(0.3 d) + 1 of the d others into floor(m / 10) + 1 means (DPC-KNN).
"+" divides each probability by what rotation leaves at its distance, takes the 14 heads of 32 that look at the image
most, and clusters nothing.

Rule: Gumpest/SparseVLMs@26a5f48, the lists of v1.5 and "+" as default schedules, as fractions of the visual tokens,
layers and heads of 32. Deviations: `keep` counts means too (the authors' 192 of [300, 200, 110] leaves 309, 204, 113),
and K follows; a mean stands in the place of its cluster's centre, theirs are appended to the visual tokens; positions
stay, those of v1.5 close up there (`positions: renumber`); of equally dense tokens the lower index is denser, in the
place of random noise; "+" divides by at least a tenth of what rotation leaves at distance 0. Where no text rates, all
text behind the image does, and where there is none, the last token.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from prunekit import ModelShape, Owners, PromptTokens, Rows, Selection, Site, Sites, hookimpl, strategy
from prunekit.ops import precise, recycle

LAYERS = (2, 6, 15)  # of 32
IMAGE = 576  # visual tokens for which the authors' lists are
Budget = Literal[192, 128, 96, 64]
KEPT = {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)}
KEPT_PLUS = {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)}


def _raters(prompt: PromptTokens) -> Tensor:
    """The text tokens whose rows rate, bool (B, S)."""
    found = torch.zeros_like(prompt.after)
    for row, (embeds, text, visual) in enumerate(zip(prompt.embeds, prompt.after, prompt.visual, strict=True)):
        shares = (precise(embeds[visual]) @ precise(embeds[text]).T).softmax(-1).mean(0)
        found[row, text] = shares > shares.mean()
    last = prompt.valid & (prompt.valid.flip(1).cumsum(1).flip(1) == 1)
    for others in (prompt.after, last):
        found = torch.where(found.any(1, keepdim=True), found, others)
    return found


def _recycled(dropped: int) -> tuple[int, int]:
    """How many of the dropped tokens are clustered, and into how many."""
    many = int(0.3 * dropped) + 1 if dropped else 0
    return many, many // 10 + 1 if many else 0


def _split(tokens: int, count: int) -> tuple[int, int, int]:
    """Tokens to keep, to cluster, and clusters, so that `count` of `tokens` stay; at least one is kept as it is."""
    for kept in range(min(count, tokens), 0, -1):
        recycled, clusters = _recycled(tokens - kept)
        if kept + clusters <= count:
            return kept, recycled, clusters
    return 1, _recycled(tokens - 1)[0], count - 1


def _sites(layers: int, left: list[int]) -> Mapping[Site, float]:
    places = [Site((layers * at + 16) // 32, "layer", "after") for at in LAYERS]
    return {site: count / IMAGE for site, count in zip(places, left, strict=True)}


def _schedule(self: "SparseVLM", layers: int) -> Mapping[Site, float]:
    left = [IMAGE]
    for kept in KEPT[self.tokens]:
        kept = min(kept, left[-1] - 1)
        left.append(kept + _recycled(left[-1] - kept)[1])
    return _sites(layers, left[1:])


@strategy(
    paper="2410.04417",
    code="Gumpest/SparseVLMs@26a5f48",
    sites=Sites(encoder=False, points=("after",)),
    inputs={"attention": Rows(layer="own", queries=_raters)},
    schedule=_schedule,
    per_sample=True,
)
class SparseVLM:
    """Keep what the words about the image attend to, and cluster the best of the others (v1.5).

    tokens: which of the authors' lists is the default schedule, by its name for 576 visual tokens.
    """

    tokens: Budget = 192

    @hookimpl
    def select_tokens(self, attention: Tensor, hidden: Tensor, count: int) -> Selection:
        """Bool (V,) and owners, from scores (V,) and states (V, H)."""
        kept, many, clusters = _split(len(attention), count)
        owner = recycle(attention, hidden, kept, many, clusters)
        return Selection(owner == torch.arange(len(owner), device=owner.device), Owners(owner))

    @hookimpl
    def flops(self, shape: ModelShape, text: int, visual: int) -> int:
        """Raters, at most all text, their rows, and distances of what is clustered, at most 0.3 of the tokens."""
        return _rating(shape, text, visual) + 3 * (visual * 3 // 10 + 1) ** 2 * shape.hidden


@strategy(
    paper="2410.04417",
    code="Gumpest/SparseVLMs@26a5f48",
    sites=Sites(encoder=False, points=("after",)),
    inputs=lambda self: {"attention": Rows(layer="own", queries=_raters, heads=self.heads, undecay=True)},
    schedule=lambda self, layers: _sites(layers, list(KEPT_PLUS[self.tokens])),
)
class SparseVLMPlus:
    """Keep what the words about the image attend to in the heads that look at it most, regardless of distance ("+").

    heads: how many of a layer's heads, or which part of them. tokens: which of the authors' lists is the default
    schedule.
    """

    heads: int | float = 14 / 32
    tokens: Budget = 192

    def __post_init__(self) -> None:
        if not (self.heads >= 1 if isinstance(self.heads, int) else 0 < self.heads < 1):
            raise ValueError("heads: is at least 1, or a fraction below 1")

    @hookimpl
    def check(self, shape: ModelShape) -> None:
        """Refuse more heads than the model has."""
        if self.heads > shape.heads:
            raise ValueError(f"heads: the model has {shape.heads} attention heads in a layer, not {self.heads}")

    @hookimpl
    def score_tokens(self, attention: Tensor) -> Tensor:
        """The attention itself, (B, V)."""
        return attention

    @hookimpl
    def flops(self, shape: ModelShape, text: int, visual: int) -> int:
        """Raters, at most all text, and their rows, once to choose heads and once to score."""
        return _rating(shape, text, visual) + shape.row_flops(text, text + visual)


def _rating(shape: ModelShape, text: int, visual: int) -> int:
    return 2 * text * visual * shape.hidden + shape.row_flops(text, text + visual)
