"""What the two training stages train, on what, and how they are watched."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from . import attention
from .compose import CHECK_SEEDS, scene
from .model import config, fresh
from .read import Read
from .see import SeeLoss, see_batch

DTYPE = torch.bfloat16


class Stage(Protocol):
    scenes: int  # a step and process

    def trained(self) -> dict[str, nn.Parameter]: ...
    def loss(self, seeds: Sequence[int], progress: float) -> tuple[Tensor, dict[str, float]]: ...
    def evaluate(self) -> dict[str, float]: ...


class See:
    """Tower and projector learn the pictures' vocabulary; the decoder takes no part."""

    scenes = 48

    def __init__(self, seed: int) -> None:
        # The decoder is not used here, so the vocabulary's size does not matter.
        self.model = fresh(config(64, 3, 0, 1, 2), seed, attention.NAME).to(DTYPE)
        self.head = SeeLoss()

    def trained(self) -> dict[str, nn.Parameter]:
        core = self.model.model
        parts = {"vision_tower": core.vision_tower, "multi_modal_projector": core.multi_modal_projector}
        named = {f"model.{part}.{n}": p for part, m in parts.items() for n, p in m.named_parameters()}
        return named | {f"head.{n}": p for n, p in self.head.named_parameters()}

    def loss(self, seeds: Sequence[int], progress: float) -> tuple[Tensor, dict[str, float]]:
        return self.head(self.model, see_batch([scene(s) for s in seeds], DTYPE), progress)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        return {f"held_{k}": v for k, v in self.loss(range(CHECK_SEEDS, CHECK_SEEDS + 200), 1.0)[1].items()}


def build(stage: str, out: Path, seed: int) -> Stage:
    if stage == "see":
        return See(seed)
    return Read(seed, load_file(out / "see.safetensors"))
