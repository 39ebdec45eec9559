"""The rule of IDPruner: importance against redundancy, by maximal marginal relevance.

Rule: Tencent/AngelSlim@67394ce, angelslim/compressor/token_compressor/algorithm/idpruner.py
(https://github.com/Tencent/AngelSlim). First the most important token, then always the one with the largest
balance * p_i - (1 - balance) * max over chosen j of cos(i, j), p the importance scaled to [0, 1] and cos that of the
projected tokens. One pool for all images.
Deviations: the authors' importance comes from a trained scorer. Here it is the attention that a token receives in the
tower, from all tokens or from CLS; a wrapper of `score_tokens` may put any other in its place. The authors' 1e-6 in the
denominator of p is left out; where all are equally important p is 0.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from prunekit import EncoderRows, ModelShape, hookimpl, strategy
from prunekit.ops import cosine, index_mask, min_max, mmr


@strategy(
    code="Tencent/AngelSlim@67394ce",
    per_sample=True,
    inputs=lambda self: {"encoder_attention": EncoderRows(query=self.query)},
)
class IDPruner:
    """Keep tokens that are attended to in the tower and unlike each other.

    query: from whom attention counts. balance: how much importance weighs against likeness. at_once: how many tokens
    are taken before the others are compared with them.
    """

    query: Literal["mean", "cls", "pool"] = "mean"
    balance: float = 0.5
    at_once: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.balance <= 1:
            raise ValueError(f"balance: is {self.balance}; it is from 0 to 1")
        if self.at_once < 1:
            raise ValueError(f"at_once: is {self.at_once}; take one token at least")

    @hookimpl
    def score_tokens(self, encoder_attention: Tensor) -> Tensor:
        """The attention itself, (V,)."""
        return encoder_attention

    @hookimpl
    def select_tokens(self, scores: Tensor, hidden: Tensor, count: int) -> Tensor:
        """Bool (V,) from importance, float (V,), and states, float (V, H)."""
        chosen = mmr(min_max(scores), cosine(hidden), count, self.balance, at_once=self.at_once)
        return index_mask(chosen, len(hidden))

    @hookimpl
    def flops(self, shape: ModelShape, text: int, visual: int) -> int:
        """At most: cosines, the products of an attention map as wide as the decoder, and a step for every token."""
        return visual**2 * (4 * shape.hidden + 4)
