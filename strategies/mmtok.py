"""MMTok (https://arxiv.org/abs/2508.18264): the subset that covers the words of the question and the whole image.

Rule: Ironieser/MMTok@d1522cd. Targets are the m words and the n tokens: P = softmax_j(cos(word_i, token_j) / 0.02) / m
in the space of the decoder's embeddings, Q = softmax_j(cos(x_i, x_j) / 0.2) / n with the tower's features x. Over the
rows w_i of [P; alpha * Q], c_i the best w_ij of the chosen j and 0 at first, always the token with the largest
sum_i max(0, w_ij - c_i) is taken. One pool for all images.
Deviations: the words are all text behind the last visual token, with what a chat template adds there (all text, where
none stands behind), and not the bare question. Padding patches are not left out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prunekit import Features, ModelShape, Sites, hookimpl, strategy
from prunekit.ops import cosine, coverage, index_mask


@strategy(
    paper="2508.18264",
    code="Ironieser/MMTok@d1522cd",
    sites=Sites(decoder=False),
    per_sample=True,
    inputs={"features": Features()},
)
class MMTok:
    """Repeatedly keep the token that adds most to the coverage of words and tokens, the latter weighted by `alpha`."""

    alpha: float = 0.5
    word_temperature: float = 0.02
    token_temperature: float = 0.2

    def __post_init__(self) -> None:
        for name in ("word_temperature", "token_temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: is {getattr(self, name)}; it is above 0")
        if not self.alpha >= 0:
            raise ValueError(f"alpha: is {self.alpha}; it is a weight from 0")

    @hookimpl
    def select_tokens(self, hidden: Tensor, features: Tensor, text: Tensor, text_after: Tensor, count: int) -> Tensor:
        """Bool (V,) from projected tokens, float (V, H), the tower's features, (V, W), and text embeddings, (T, H)."""
        words = text[text_after | ~text_after.any()]
        by_words = (cosine(words, hidden) / self.word_temperature).softmax(-1) / len(words)
        by_tokens = (cosine(features) / self.token_temperature).softmax(-1) / len(features)
        chosen = coverage(torch.cat([by_words, self.alpha * by_tokens.to(by_words)]), count)
        return index_mask(chosen, len(hidden))

    @hookimpl
    def flops(self, shape: ModelShape, text: int, visual: int) -> int:
        """At most: cosines of features as wide as the decoder, and a step for every token."""
        return (2 * shape.hidden + 3 * visual) * (text + visual) * visual
