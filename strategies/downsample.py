"""Baseline: smaller images, the oldest way to have fewer visual tokens (https://arxiv.org/abs/2502.11501)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prunekit import hookimpl, strategy


@strategy(group="baselines", fixed_count=True)
class Downsample:
    """Show every image and video to the vision tower at a fraction of its sides.

    scale: the factor of both sides; 0.5 leaves a quarter of the visual tokens where the model takes images of any size.
    Where it takes one size only, the image is made smaller and enlarged again: all tokens stay, with less to see, which
    is what a cut of the tokens is measured against.
    """

    scale: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.scale <= 1:
            raise ValueError(f"scale: {self.scale} is not above 0 and at most 1")

    @hookimpl
    def resize_images(self, images: Sequence[Tensor]) -> Tensor:
        """The same factor for all: float (B,)."""
        return torch.full((len(images),), self.scale)
