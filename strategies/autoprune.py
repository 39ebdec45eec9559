"""AutoPrune (https://arxiv.org/abs/2509.23931, NeurIPS 2025): each sample gets the schedule that suits its question.

Behind layer 0 the best min(floor(2.5 T), n) stay by c_i + 0.3 I / Q a_i: CLS attention c in the tower's last block that
makes features, and a, the mean over heads and the Q words behind the image of their attention; I = sum over heads of
the mutual information, in bits, of words (equally likely) and tokens p(i | t) = a_ti. Behind every later layer l the
best ceil((n - 1) s f(l)) by a stay and some of the others are clustered (as in SparseVLM), f(l) = 0.75 / (1 + exp(k (l
- x0 - k))), k = max(k0 - gamma I, 0), with I of layer 1; s, by bisection, brings the mean over layers of what is left
to T.

Rule: AutoLab-SAI-SJTU/AutoPrune@e4a9918. The paper describes the logistic curve; the CLS term and the clusters are in
the code. Deviations: the curve is stretched to the depth (of 32); nothing leaves behind the last layer, though it
counts; a mean stands in the place of its cluster's centre, theirs are appended, and positions stay, theirs close up
(`positions: renumber`); of equally dense tokens the lower index is denser, in the place of random noise; where no text
is behind the image, the last token reads.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from prunekit import EncoderRows, ModelShape, Owners, PromptTokens, Rows, Selection, Site, Sites, hookimpl, strategy
from prunekit.ops import precise, recycle, top_k_mask

EPSILON = 1e-6
AT_FIRST = 2.5  # times the mean number of tokens
TEXT = 0.3  # what a bit of information weighs beside CLS


def _readers(prompt: PromptTokens) -> Tensor:
    """The text behind the image, or the last token where there is none: bool (B, S)."""
    last = prompt.valid & (prompt.valid.flip(1).cumsum(1).flip(1) == 1)
    return torch.where(prompt.after.any(1, keepdim=True), prompt.after, last)


def _information(attention: Tensor) -> float:
    """Mutual information in bits, summed over heads, of attention, float (V, A, Q)."""
    joint = attention / attention.shape[-1]
    ratio = joint / (joint.sum(-1, keepdim=True) / attention.shape[-1] + EPSILON)
    return float((joint * ratio.clamp(min=EPSILON).log2()).sum())


def _recycled(dropped: int) -> tuple[int, int]:
    """How many of the dropped tokens are clustered, and into how many."""
    many = int(0.3 * dropped) + 1 if dropped else 0
    return many, min(many // 10 + 1, many)


def _total(tokens: int, kept: list[int]) -> int:
    """The tokens that are left behind all layers together."""
    left = total = tokens
    for number in kept:
        left = number + _recycled(left - number)[1]
        total += left
    return total


@strategy(
    paper="2509.23931",
    code="AutoLab-SAI-SJTU/AutoPrune@e4a9918",
    sites=Sites(encoder=False, points=("after",)),
    inputs=lambda self: {
        "attention": Rows(layer="own", queries=_readers, heads="none", over="none"),
        "encoder_attention": EncoderRows(query=self.query),
    },
    keep="refused",
    schedule=lambda self, layers: {Site(layer, "layer", "after"): None for layer in range(max(layers - 1, 1))},
    per_sample=True,
)
class AutoPrune:
    """Keep what the question attends to, behind every layer fewer, by a curve that follows from what it tells.

    layer_mean: the visual tokens left, as a mean over all layers, as a fraction of those that reach the first site. k0,
    gamma, x0: of the curve. query: who attends in the tower, `cls`; or `mean`, all its tokens, for towers without CLS.
    """

    layer_mean: float = 0.111
    k0: float = 0.4
    gamma: float = 0.2
    x0: float = 14.9
    query: Literal["cls", "mean"] = "cls"

    def __post_init__(self) -> None:
        if not 0 < self.layer_mean <= 1:
            raise ValueError("layer_mean: is a fraction, above 0 and at most 1")

    @hookimpl
    def select_tokens(
        self,
        attention: Tensor,
        encoder_attention: Tensor,
        hidden: Tensor,
        cut: int,
        sites: tuple[Site, ...],
        state: dict[str, Any],
    ) -> Selection:
        """Bool (V,) and owners from attention, float (V, A, Q), the tower's, float (V,), and states (V, H)."""
        read = precise(attention)
        score, tokens = read.mean((1, 2)), len(read)
        if cut == 0:
            state["mean"] = max(math.floor(self.layer_mean * tokens + 0.5 + 1e-9), 1)
            weight = TEXT * _information(read) / read.shape[-1]
            return Selection(top_k_mask(precise(encoder_attention) + weight * score, int(AT_FIRST * state["mean"])))
        if cut == 1:
            state["kept"] = self._kept(tokens, state["mean"], _information(read), len(sites) + 1)
        kept = min(state["kept"][cut - 1], tokens)
        owner = recycle(score, hidden, kept, *_recycled(tokens - kept))
        return Selection(owner == torch.arange(tokens, device=owner.device), Owners(owner))

    def _kept(self, tokens: int, mean: int, information: float, layers: int) -> list[int]:
        """How many stay behind each layer but the first, before clusters."""
        k = max(self.k0 - self.gamma * information, 0.0)
        curve = [0.75 / (1 + math.exp(k * (32 * layer / layers - self.x0 - k))) for layer in range(1, layers)]
        low, high, best, least = 0.0, 20.0, 1.0, math.inf
        for _ in range(200):
            scale = (low + high) / 2
            off = _total(tokens, [math.ceil((tokens - 1) * min(scale * one, 1.0)) for one in curve]) - layers * mean
            if abs(off) < least:
                best, least = scale, abs(off)
            low, high = (scale, high) if off < 0 else (low, scale)
        return [math.ceil((tokens - 1) * (best * one)) for one in curve]

    @hookimpl
    def flops(self, shape: ModelShape, text: int, visual: int) -> int:
        """The rows of at most all text, and distances of what is clustered, at most 0.3 of the tokens."""
        return shape.row_flops(text, text + visual) + 3 * (visual * 3 // 10 + 1) ** 2 * shape.hidden
