"""Ways to choose visual tokens, for the card: blind ones, informed ones, an oracle.

Each takes a `View` and a number of tokens and returns indices int64 `[B, count]`, sorted. They are kept
apart from the strategies on purpose: the card vouches for the model, whatever happens to a strategy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from prunekit_evals.micro import drop
from prunekit_evals.micro.compose import GRID, PATCH_SIZE, Scene, patch_owner
from torch import Tensor


@dataclass(frozen=True)
class View:
    """A batch as the tower saw it: projected features `[B, 144, H]`, CLS attention `[B, 144]`, the scenes."""

    features: Tensor
    cls_attention: Tensor
    scenes: list[Scene]

    def rng(self) -> np.random.Generator:
        return np.random.default_rng([self.scenes[0].seed, 7])


def most(scores: Tensor, count: int) -> Tensor:
    """The highest scores, `[B, 144]`."""
    return scores.topk(count, -1).indices.sort(-1).values


def random(view: View, count: int) -> Tensor:
    return torch.from_numpy(drop.kept(view.rng(), len(view.scenes), count, "random"))


def stride(view: View, count: int) -> Tensor:
    total = view.features.shape[1]
    return (torch.arange(count) * total // max(count, 1)).expand(len(view.scenes), -1)


def cls(view: View, count: int) -> Tensor:
    """Most attended by the CLS token in the layer that the features come from, mean over heads."""
    return most(view.cls_attention, count)


def diversity(view: View, count: int) -> Tensor:
    """Greedy max-min cosine distance of the projected features (DivPrune, arXiv:2503.02175)."""
    unit = torch.nn.functional.normalize(view.features.float(), dim=-1)
    distance = 1 - unit @ unit.mT
    batch = torch.arange(len(unit))
    distance.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    chosen = [distance.amin(-1).argmax(-1)]
    nearest = distance[batch, chosen[0]]
    while len(chosen) < count:
        nearest[batch, chosen[-1]] = -1
        chosen.append(nearest.argmax(-1))
        nearest = torch.minimum(nearest, distance[batch, chosen[-1]])
    return torch.stack(chosen, 1).sort(-1).values


def oracle(view: View, count: int) -> Tensor:
    """The patches nearest the middle of each thing, dealt out evenly over the things, then background."""
    rows = []
    for shown in view.scenes:
        owner = patch_owner(shown)
        rank = 1000 + view.rng().permutation(len(owner)).astype(np.float64)
        for i, thing in enumerate(shown.things):
            own = (owner == i).nonzero()[0]
            y, x = np.divmod(own, GRID)
            across, down = thing.middle
            away = np.hypot((x + 0.5) * PATCH_SIZE - across, (y + 0.5) * PATCH_SIZE - down)
            rank[own[away.argsort(kind="stable")]] = np.arange(len(own))
        rows.append(np.sort(rank.argsort(kind="stable")[:count]))
    return torch.from_numpy(np.stack(rows))


SELECTIONS: dict[str, Callable[[View, int], Tensor]] = {
    "random": random, "stride": stride, "diversity": diversity, "CLS attention": cls, "oracle": oracle,
}  # fmt: skip
