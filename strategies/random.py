"""Baseline: a random subset. Many published methods lose to it (https://arxiv.org/abs/2502.11501)."""

from __future__ import annotations

import torch
from torch import Tensor

from prunekit import hookimpl, strategy


@strategy(group="baselines", per_sample=True)
class Random:
    """Keep tokens uniformly at random.

    seed: another seed, another draw. The draw of a sample depends on `seed` and on its own prompt and pixels, so it is
    the same alone and in any batch, and differs between samples.
    """

    seed: int = 0

    @hookimpl
    def score_tokens(self, valid: Tensor, seed: int) -> Tensor:
        """Uniform scores, float (V,), drawn on the CPU so that every device gets the same."""
        generator = torch.Generator().manual_seed((seed + 1_000_003 * self.seed) % 2**63)
        return torch.rand(valid.shape[0], generator=generator).to(valid.device)
