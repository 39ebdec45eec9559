"""TRIM (https://arxiv.org/abs/2409.10994, COLING 2025): what the words of the question do not point at is summed up.

Rule, for each image: s = softmax over its tokens of -(p_i . w), p = visual_projection(post_layernorm(x)) of the
features x that the projector gets and w the pooled text of the question, both in the space of the CLIP model that the
tower was taken from, not normalised. Kept are as many of the largest s as lie above Q3 + 1.5 (Q3 - Q1), and one token
more, the mean of the dropped ones.

Studied: FreedomIntelligence/TRIM@f5a232d, without its training. Deviations: quartiles are those of each image, where
the authors' are of the flattened batch; scores are computed in float32, where theirs are rounded to half precision; the
mean, which as theirs goes through the projector afterwards, stands in the place of the last dropped token. With a
budget (the authors have a fixed ratio) an image keeps exactly its share, the mean among it. Longer questions than the
text tower takes are cut off.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from prunekit_strategies.clip_text.pair import Paired
from torch import Tensor

from prunekit import ModelShape, Selection, Sites, hookimpl, strategy
from prunekit.ops import crop_quotas, group_members, outliers, precise, slot_weights, top_k_mask


@strategy(
    paper="2409.10994",
    code="FreedomIntelligence/TRIM@f5a232d",
    sites=Sites(decoder=False),
    keep="optional",
    per_sample=True,
)
class TRIM(Paired):
    """Keep what the question is about, by CLIP's text tower, and the mean of the rest. clip: as for `Paired`."""

    @hookimpl
    def select_tokens(
        self,
        features: Tensor,
        question: str,
        coords: Tensor,
        project: Callable[[Tensor], Tensor],
        count: int | None,
    ) -> Selection:
        """`count` tokens, or one more than outliers of each image; means are extras, float (E, H), one an image."""
        states = precise(features)
        pair = self._pair(states)
        likeness = pair.patches(states) @ pair.segments(question)[0]
        groups, quota = crop_quotas(coords, torch.zeros_like(coords[:, 0]), len(coords) if count is None else count)
        keep, means = torch.zeros_like(groups, dtype=torch.bool), {}
        for tokens, share in zip(group_members(groups, len(quota)), quota.tolist(), strict=True):
            separates = bool(coords[tokens[0], 1] < 0)
            if count is not None and (separates or share == len(tokens)):
                keep[tokens[:share]] = True
            elif share and not separates:
                scores = (-likeness[tokens]).softmax(0)
                chosen = top_k_mask(scores, int(outliers(scores).sum()) if count is None else share - 1)
                dropped = tokens[~chosen]
                means[int(dropped[-1])] = states[dropped].mean(0)
                keep[tokens[chosen]] = keep[dropped[-1]] = True
        slots = torch.tensor(list(means), dtype=torch.int64, device=keep.device)
        made = torch.stack([*means.values()]) if means else states[:0]
        return Selection(keep, slot_weights(slots, len(keep)), extras=project(made.to(features)))

    @hookimpl
    def flops(self, shape: ModelShape, text: int, visual: int) -> int:
        """The text tower on the question, and the projection of the patches; its width counts as that of the tower."""
        width = shape.tower.width if shape.tower else 0
        return self._text_flops(text) + 2 * visual * width * (width + 1)
