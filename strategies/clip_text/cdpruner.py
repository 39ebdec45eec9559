"""CDPruner (https://arxiv.org/abs/2506.10967, NeurIPS 2025): tokens that span most, weighed by the question.

Rule, for each crop or frame with T tokens to keep: r_i = -mean over segments of the question of cos(p_i, w), p =
visual_projection(post_layernorm(x)) of the features x that the projector gets and w the text, both in the space of the
CLIP model that the tower was taken from; r <- (r - min r + 1e-6) / (max r - min r); greedily the T tokens that maximise
the determinant of r_i cos(h_i, h_j) r_j, h the projected tokens.

Studied: Theia-4869/CDPruner@9541616. Deviations: minimum and maximum are those of each image, with `scale: sample`
those of all images of a prompt, where the authors' are of the whole batch; segments of the question are as long as the
text tower takes, with start and end of their own; nothing is stripped from it, as their evaluation strips its
instructions; `keep` is of a sample and is shared between its crops in proportion to their tokens, newlines last.

`cdpruner_embeds` needs no CLIP model: r is the mean cosine of the projected token with the embeddings of the words
behind the image, as in OpenVINO's port for other models, whose sign is an option there, too.
"""

from __future__ import annotations

from typing import Literal

import torch
from prunekit_strategies.clip_text.pair import Paired
from torch import Tensor

from prunekit import ModelShape, hookimpl, strategy
from prunekit.ops import cosine, crop_quotas, dpp, group_members, precise

Scale = Literal["image", "sample"]


@strategy(paper="2506.10967", code="Theia-4869/CDPruner@9541616", per_sample=True)
class CDPruner(Paired):
    """Keep tokens that are unlike each other and relevant to the question by CLIP's text tower.

    clip: as for `Paired`. scale: over what relevance is scaled.
    """

    scale: Scale = "image"

    @hookimpl
    def select_tokens(
        self, hidden: Tensor, features: Tensor, question: str, coords: Tensor, frames: Tensor, count: int
    ) -> Tensor:
        """Bool (V,) with exactly `count` True."""
        features = precise(features)
        pair = self._pair(features)
        relevance = -cosine(pair.patches(features), pair.segments(question)).mean(1)
        return _chosen(hidden, relevance, coords, frames, count, self.scale)

    @hookimpl
    def flops(self, shape: ModelShape, text: int, visual: int) -> int:
        """The text tower, the projection of the patches, cosines within each crop, and at most so many greedy steps."""
        width = shape.tower.width if shape.tower else 0
        return self._text_flops(text) + 2 * visual * width**2 + _dpp_flops(shape, visual)


@strategy(paper="2506.10967", code="Theia-4869/CDPruner@9541616", per_sample=True)
class CDPrunerEmbeds:
    """Keep tokens that are unlike each other and relevant to the question by the decoder's own embeddings.

    negative: the less alike, the more relevant. scale: over what relevance is scaled.
    """

    negative: bool = False
    scale: Scale = "image"

    @hookimpl
    def select_tokens(
        self, hidden: Tensor, text: Tensor, text_after: Tensor, coords: Tensor, frames: Tensor, count: int
    ) -> Tensor:
        """Bool (V,) with exactly `count` True."""
        words = text[text_after | ~text_after.any()]
        relevance = cosine(hidden, words).mean(1) if len(words) else torch.zeros_like(hidden[:, 0])
        return _chosen(hidden, -relevance if self.negative else relevance, coords, frames, count, self.scale)

    @hookimpl
    def flops(self, shape: ModelShape, text: int, visual: int) -> int:
        """Cosines with the text and within each crop, and at most so many greedy steps."""
        return 2 * visual * text * shape.hidden + _dpp_flops(shape, visual)


def _chosen(hidden: Tensor, relevance: Tensor, coords: Tensor, frames: Tensor, count: int, scale: Scale) -> Tensor:
    groups, quota = crop_quotas(coords, frames, count)
    images = coords[:, 0] if scale == "image" else torch.zeros_like(coords[:, 0])
    relevance = _scaled(relevance, images.masked_fill(coords[:, 1] < 0, -1))
    keep = torch.zeros_like(groups, dtype=torch.bool)
    for tokens, share in zip(group_members(groups, len(quota)), quota.tolist(), strict=True):
        similarity = cosine(hidden[tokens])
        similarity.diagonal().round_()  # of a token with itself, 1 but for rounding, which must not decide
        keep[tokens[dpp(similarity, share, relevance[tokens])]] = True
    return keep


def _scaled(relevance: Tensor, images: Tensor) -> Tensor:
    """To about [0, 1] within each image; 1 where all are alike, and on tokens of image -1."""
    scaled = torch.ones_like(relevance)
    for image in torch.unique(images).tolist():
        inside = images == image
        low, high = relevance[inside].aminmax()
        if image >= 0 and high > low:
            scaled[inside] = (relevance[inside] - low + 1e-6) / (high - low)
    return scaled


def _dpp_flops(shape: ModelShape, visual: int) -> int:
    crop = min(visual, shape.visual_tokens or visual)
    return 2 * visual * crop * shape.hidden + visual * crop**2
