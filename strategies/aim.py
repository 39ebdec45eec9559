"""AIM (https://arxiv.org/abs/2412.03248, ICCV 2025): similar tokens merge, then unimportant ones leave by layers.

`aim`: the tokens of a crop or frame are split alternately into A and B; each of A proposes the one of B with the
largest cosine, and the strongest proposals merge by the mean, half of the tokens at most. The line is then the rest of
A by falling similarity, then B, and the same again, until `keep` is left; a quarter by default, in two rounds.
`aim_decoder`: importance = sqrt(mean over heads of p^2), p after five steps p <- p M from equal weights, M = softmax of
the layer's masked logits over 0.1; after layers N / 2, N / 2 + 1, ... a further 1/8 of the tokens that entered leaves,
after eight layers the last (N = 28).

Rule: LaVi-Lab/AIM@edc24e9, which runs `aim` on video frames only, and masks in the decoder where tokens leave here.
Deviations: tokens that have left start no step of p, masked ones do in theirs; merged tokens stand in the place of the
one of B, and positions stay; layers scale with the depth; `keep` of a sample is shared between its crops in proportion
to their tokens, newlines last; a merged token's mean counts it as one token, as in theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from prunekit import ENCODER, ModelShape, Owners, Rows, Selection, Site, Sites, hookimpl, strategy
from prunekit.ops import bipartite_matching, cosine, crop_quotas, group_members, precise, ranks, top_k_mask

STEPS, TEMPERATURE = 5, 0.1


@strategy(paper="2412.03248", code="LaVi-Lab/AIM@edc24e9", sites=Sites(), schedule={ENCODER: 0.25}, per_sample=True)
class AIM:
    """Merge the most similar tokens of each crop or frame, half of them in each round; a quarter is left."""

    @hookimpl
    def select_tokens(self, hidden: Tensor, coords: Tensor, frames: Tensor, count: int) -> Selection:
        """Bool (V,), owners and amounts from states, float (V, H)."""
        groups, quota = crop_quotas(coords, frames, count)
        owner, amounts = torch.full_like(groups, -1), precise(hidden[:, 0]).new_ones(len(groups))
        for tokens, share in zip(group_members(groups, len(quota)), quota.tolist(), strict=True):
            if share:
                mine, weights = _merged(precise(hidden[tokens]), share)
                owner[tokens], amounts[tokens] = tokens[mine], weights
        keep = owner == torch.arange(len(owner), device=owner.device)
        return Selection(keep, Owners(owner, "sum", amounts))

    @hookimpl
    def flops(self, shape: ModelShape, text: int, visual: int) -> int:
        """The cosines of all tokens of a crop, of half of them, and so on."""
        return 8 * visual * min(visual, shape.visual_tokens or visual) * shape.hidden // 3


def _merged(states: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Owners, int64 (V,), and amounts, float (V,), of one crop of which `count` tokens stay. states: float (V, H)."""
    line = torch.arange(len(states), device=states.device)
    owner, amounts = line.clone(), states.new_ones(len(states))
    while len(line) > count:
        place = torch.arange(len(line), device=line.device)
        source, similarity = place % 2 == 0, cosine(states)
        to = bipartite_matching(similarity, min(len(line) - count, len(line) // 2), sources=source)
        number = torch.bincount(to, minlength=len(line))
        at = torch.empty_like(owner).index_copy_(0, line, place)[owner]
        owner, amounts = line[to[at]], amounts / number[to[at]]
        states = torch.zeros_like(states).index_add(0, to, states) / number.clamp(min=1)[:, None]
        likest = similarity.masked_fill(source[None], -torch.inf).amax(1)
        first = place[(to == place) & source]
        left = torch.cat([first[ranks(likest[first]).argsort()], place[~source]])
        line, states = line[left], states[left]
    return owner, amounts


def _layers(self: AIMDecoder, layers: int) -> Mapping[Site, None]:
    """Eight layers of 28, from the middle on."""
    return {Site(layers // 2 + step, "layer", "after"): None for step in range(max(layers * 2 // 7, 1))}


@strategy(
    paper="2412.03248",
    code="LaVi-Lab/AIM@edc24e9",
    sites=Sites(encoder=False, points=("after",)),
    inputs={"attention": Rows(layer="own", queries="all", heads="none", temperature=TEMPERATURE, steps=STEPS)},
    keep="optional",
    schedule=_layers,
    per_sample=True,
)
class AIMDecoder:
    """Keep what attention, passed on five times, ends at; fewer after each site, and none after the last.

    With `keep` that many.
    """

    @hookimpl
    def select_tokens(
        self, attention: Tensor, cut: int, sites: tuple[Site, ...], state: dict[str, Any], count: int | None
    ) -> Tensor:
        """Bool (V,) from what each token holds in each head, float (V, A)."""
        entered = state.setdefault("entered", len(attention))
        left = entered * (len(sites) - 1 - cut) // len(sites) if count is None else count
        return top_k_mask(precise(attention).square().mean(-1).sqrt(), left)

    @hookimpl
    def flops(self, shape: ModelShape, text: int, visual: int) -> int:
        """All rows in each step, and what they pass on."""
        tokens = text + visual
        return STEPS * (shape.row_flops(tokens, tokens) + 2 * tokens**2 * shape.heads)
