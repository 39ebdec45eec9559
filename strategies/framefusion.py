"""FrameFusion (https://arxiv.org/abs/2501.01986, ICCV 2025): what a video repeats merges, then the rest is pruned.

Rule, at each site in turn, in front of layer 0 and then between attention and MLP of every layer: a token whose cosine
with the nearest earlier token at its place is at least `similarity` joins it; runs of them become their mean, in the
place of the first. Once less than `least` of the tokens merge, the next site keeps those that the last prompt token
attends to most in this layer, and nothing leaves from then on. What has to go follows from the tokens that the layers
so far have seen: with parts s_1, s_2 ... left after each merge, x of them have to leave where the other layers, of N,
then see (1 - x) s_i, and all together `cost` N. Where more than x would merge, the likest do, and nothing leaves later.

Studied: thu-nics/FrameFusion@fbec1d2. Deviations: N is the model's number of layers, the authors always count 28; where
the budget is spent before the pruning, one token is left, theirs is an error; newlines neither merge nor are they
merged, but can be pruned. Positions stay. Images have nothing to merge, so that they are pruned inside layer 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from prunekit import ModelShape, Owners, Rows, Selection, Site, Sites, hookimpl, strategy
from prunekit.ops import precise, same_place, top_k_mask


def _throughout(self: FrameFusion, layers: int) -> Mapping[Site, None]:
    """In front of the decoder, and inside every layer."""
    return dict.fromkeys([Site(None), *(Site(layer, "layer", "mid") for layer in range(layers))])


@strategy(
    paper="2501.01986",
    code="thu-nics/FrameFusion@fbec1d2",
    group="video",
    sites=Sites(points=("mid",)),
    inputs={"attention": Rows(layer="own", queries="last", heads="mean", optional=True)},
    schedule=_throughout,
    keep="refused",
    per_sample=True,
)
class FrameFusion:
    """Merge what a video repeats, layer by layer, then keep what the last prompt token attends to.

    cost: the part of the visual tokens that layers see on average. similarity: tokens with at least this cosine merge.
    least: once a smaller part of the tokens merges, the rest is pruned.
    """

    cost: float = 0.3
    similarity: float = 0.6
    least: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.cost <= 1:
            raise ValueError(f"cost: is {self.cost}; it is a part, above 0 and up to 1")
        if not 0 <= self.least <= 1:
            raise ValueError(f"least: is {self.least}; it is a part, from 0 to 1")

    @hookimpl
    def select_tokens(
        self,
        hidden: Tensor,
        attention: Tensor | None,
        coords: Tensor,
        frames: Tensor,
        videos: Tensor,
        shape: ModelShape,
        state: dict[str, Any],
    ) -> Tensor | Selection:
        """Bool (V,), and who joins whom, from states, float (V, H), and attention, float (V,)."""
        phase, merged = state.get("phase", "merge"), state.setdefault("merged", [])
        if phase == "done":
            return torch.ones_like(videos)
        spare = self._spare(merged, shape.layers)
        if phase == "prune" and attention is not None:
            state["phase"] = "done"
            return top_k_mask(attention, max(round(len(hidden) * (1 - spare)), 1))
        x, before = precise(hidden), same_place(coords, frames).masked_fill(~videos, -1)
        alike = cosine_similarity(x, x[before.clamp(min=0)], dim=-1).masked_fill(before < 0, -torch.inf)
        joins = alike >= self.similarity
        part = int(joins.sum()) / len(x)
        if part < spare:
            merged.append(part)
            state["phase"] = "prune" if part < self.least else "merge"
        else:
            joins = top_k_mask(alike, int(spare * len(x)), joins)
            state["phase"] = "done"
        root = torch.where(joins, before, torch.arange(len(x), device=x.device))
        for _ in range(int(frames.max()).bit_length()):  # each round doubles how far a run is followed
            root = root[root]
        return Selection(~joins, Owners(root))

    def _spare(self, merged: list[float], layers: int) -> float:
        """The part of the tokens that has to leave here, so that all layers see `cost` of them on average."""
        left, seen = 1.0, 0.0
        for part in merged:
            left *= 1 - part
            seen += left
        rest = (layers - len(merged)) * left
        return 0.0 if rest <= 0 else max(1 - (layers * self.cost - seen) / rest, 0.0)

    @hookimpl
    def flops(self, shape: ModelShape, text: int, visual: int) -> int:
        """Of one site: a cosine for each token, and one row."""
        return shape.row_flops(1, text + visual) + 6 * visual * shape.hidden
