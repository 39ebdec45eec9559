"""What a router gives to be trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from prunekit.errors import Unsupported
from prunekit.families.base import Parts
from prunekit.pipeline.stage import Stage
from prunekit.strategy.decisions import ModelShape


class Learner(Protocol):
    """A router of one LVLM while it learns. Letters: B batch, S prompt positions, H hidden, N decoder layers.

    module: the network; its state dict is what checkpoints hold.
    """

    module: nn.Module

    def scores(self, embeds: Tensor, visual: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of keeping: positions, float (B, S), layers, float (B, N); from float (B, S, H), bool (B, S) twice."""

    def noisy(
        self, embeds: Tensor, visual: Tensor, valid: Tensor, std: float, seeds: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """The same, disturbed by noise of this deviation, with one seed for each row."""

    def parameters(self) -> Mapping[str, Sequence[nn.Parameter]]:
        """What is trained: `new` parameters, and `copied` ones, which learn more slowly."""

    def snapshot(self) -> Learner:
        """A copy that no longer learns."""

    def save_pretrained(self, folder: Path, model_id: str, training: Mapping[str, Any], card: str) -> None:
        """Write the router so that the stage's options can name it."""


def learner_of(stage: Stage, shape: ModelShape, parts: Parts) -> Learner:
    """The learner of a router stage. Raises Unsupported for a strategy that has nothing to train."""
    if not stage.states("learner"):
        raise Unsupported(f"{stage.label} has nothing to train: its class does not implement the hook `learner`")
    config: Any = parts.text.config
    rope = getattr(config, "rope_parameters", None) or {}
    theta = rope.get("rope_theta") or getattr(config, "rope_theta", None) or 10000.0
    learner: Learner = stage.hook.learner(shape=shape, layers=list(parts.layers), theta=float(theta))
    return learner
