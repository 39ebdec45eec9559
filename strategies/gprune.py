"""G-Prune (https://arxiv.org/abs/2501.02268): importance flows along a graph of similar tokens.

Rule: jytmelon/G-Prune@2762c63. Tokens i and j have an edge where their cosine s_ij is at least 0.5, as with themselves;
W = softmax_j(s_ij / 0.03) over the edges. From r = the tokens' norms five times r <- r W, then r_i is divided by the
number of edges of i. The highest stay; the whole image and its crops are two graphs, and newlines always stay.
Deviations: the count includes newlines, and what they leave is split over the graphs in proportion to their tokens and
exactly, where the authors truncate a ratio of each. Every image has graphs of its own; of a video the first frame has
one, and all others together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prunekit import ModelShape, hookimpl, strategy
from prunekit.ops import cosine, crop_quotas, precise, top_k_mask


@strategy(paper="2501.02268", code="jytmelon/G-Prune@2762c63", per_sample=True)
class GPrune:
    """Keep what is important after five steps on a graph of similar tokens."""

    threshold: float = 0.5
    temperature: float = 0.03
    steps: int = 5

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature: is {self.temperature}; it is above 0")
        if self.steps < 0:
            raise ValueError(f"steps: is {self.steps}; it is a number from 0")

    @hookimpl
    def select_tokens(self, hidden: Tensor, coords: Tensor, frames: Tensor, count: int) -> Tensor:
        """Bool (V,) from the tokens' states, float (V, H)."""
        shows = coords[:, 1] >= 0
        keep = top_k_mask(~shows, count) & ~shows
        if rest := count - int(keep.sum()):
            shown = shows.nonzero()[:, 0]
            groups, quota = crop_quotas(coords[shown], frames[shown].clamp(max=1), rest)
            for graph, wanted in enumerate(quota.tolist()):
                members = shown[groups == graph]
                keep[members] = top_k_mask(self._importance(hidden[members]), wanted)
        return keep

    def _importance(self, tokens: Tensor) -> Tensor:
        """float (n,) from the states of one graph, float (n, H)."""
        similarity = cosine(tokens)
        itself = torch.eye(len(tokens), dtype=torch.bool, device=tokens.device)
        edges = (similarity >= self.threshold) | itself
        flow = (similarity / self.temperature).masked_fill(~edges, -torch.inf).softmax(-1)
        importance = precise(tokens).norm(dim=-1)
        for _ in range(self.steps):
            importance = importance @ flow
        return importance / edges.sum(-1)

    @hookimpl
    def flops(self, shape: ModelShape, text: int, visual: int) -> int:
        """All cosines, and the steps, as in one graph."""
        return 2 * visual**2 * (shape.hidden + self.steps)
