"""A PAR router (https://arxiv.org/abs/2412.06458) as `prunekit train` sees it: scores, noise, parameters, saving."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prunekit_strategies.par import files
from prunekit_strategies.par.router import Noise, Router
from torch import Tensor, nn

from prunekit import ModelShape


class Learner:
    """The router of one LVLM while it learns.

    module: the network, in float32; a wrapper with the same forward may take its place. copied: which of its children
    started as copies of the LVLM's blocks, and learn more slowly.
    """

    def __init__(self, router: Router, shape: ModelShape, copied: frozenset[str]) -> None:
        self.router, self.shape, self.copied = router, shape, copied
        self.module: nn.Module = router

    def scores(self, embeds: Tensor, visual: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of positions, float (B, S), and of decoder layers, float (B, N), from float (B, S, H), bool (B, S)."""
        scores: tuple[Tensor, Tensor] = self.module(embeds, visual, valid)
        return scores

    def noisy(
        self, embeds: Tensor, visual: Tensor, valid: Tensor, std: float, seeds: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """The same with Gaussian noise of this deviation on the router's attention logits, one seed for each row."""
        return self.router(embeds, visual, valid, Noise(std, seeds))

    def parameters(self) -> Mapping[str, Sequence[nn.Parameter]]:
        """What is trained: `new` parameters, and `copied` ones."""
        groups: dict[str, list[nn.Parameter]] = {"new": [], "copied": []}
        for name, parameter in self.router.named_parameters():
            groups["copied" if name.partition(".")[0] in self.copied else "new"].append(parameter)
        return groups

    def snapshot(self) -> Learner:
        """A copy that no longer learns."""
        return Learner(copy.deepcopy(self.router).requires_grad_(False), self.shape, self.copied)

    def save_pretrained(self, folder: Path, model_id: str, training: Mapping[str, Any], card: str) -> None:
        """Write a router folder that `weights:` can name."""
        files.save(self.router, folder, files.numbers_of(self.shape, model_id), training, card)
