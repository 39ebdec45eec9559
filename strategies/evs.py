"""EVS, Efficient Video Sampling (https://arxiv.org/abs/2510.14624; its count as in vllm-project/vllm@094f117)."""

from __future__ import annotations

import torch
from torch import Tensor

from prunekit import PIXELS, Sites, hookimpl, strategy
from prunekit.ops import same_place

FIRST = 255.0  # what stands for the change of a token that has none before it


@strategy(
    paper="2510.14624",
    code="vllm-project/vllm@094f117",
    group="video",
    fixed_count=True,
    sites=Sites(default=PIXELS, encoder=False, decoder=False, pixels=True),
    keep="refused",
    per_sample=True,
)
class Evs:
    """Before the tower, keep of a video the squares of pixels that have changed most since the frame before.

    A change is the mean absolute difference of the pixels to those at the same place one frame earlier, whether these
    stay or not. The first frame stays whole. Of F frames of n tokens, max(n, int(F * n * (1 - rate))) stay, computed in
    double precision as the serving engines do: 19 of 200 at rate 0.9 and n = 10. The number is for the whole video, so
    that a frame at rest may lose every token; of equal changes the earlier token stays. A still image is its own first
    frame, and passes.
    rate: the part that leaves.
    """

    rate: float = 0.75

    def __post_init__(self) -> None:
        if not 0 <= self.rate < 1:
            raise ValueError(f"rate: {self.rate} is not at least 0 and below 1")

    @hookimpl
    def select_tokens(self, patches: Tensor, coords: Tensor, frames: Tensor) -> Tensor:
        """The squares that stay: bool (V,)."""
        keep = torch.zeros(len(patches), dtype=torch.bool, device=patches.device)
        if len(patches) == 0:
            return keep
        first = int((frames == frames.min()).sum())
        wanted = max(first, int(len(patches) * (1 - self.rate)))
        order = _changes(patches, coords, frames).argsort(descending=True, stable=True)
        return keep.index_fill(0, order[:wanted], True)


def _changes(patches: Tensor, coords: Tensor, frames: Tensor) -> Tensor:
    """How much each square of (V, F, C, Y, X) differs from the same place one frame before, (V,)."""
    before, squares = same_place(coords, frames, 1), patches.flatten(1)
    apart = (squares - squares[before.clamp(min=0)]).abs().mean(-1)
    return apart.masked_fill(before < 0, FIRST)
