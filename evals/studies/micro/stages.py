"""What the training stages train, on what, and how their progress is measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from prunekit_evals.micro import attention
from prunekit_evals.micro.compose import CHECK_SEEDS, TOKENS, scene
from prunekit_evals.micro.packing import pixels
from prunekit_evals.studies.micro.model import SEEING, config, fresh
from prunekit_evals.studies.micro.see import Recorder, SeeLoss, shown
from safetensors.torch import load_file
from torch import Tensor, nn

DTYPE = torch.bfloat16
SETTLE = 0.15  # weight, reached at half-time, of the states' distance to the plain sum of their words


class Stage(Protocol):
    scenes: int  # a step and process

    def trained(self) -> dict[str, nn.Parameter]: ...
    def slow(self, name: str) -> bool: ...
    def pace(self, progress: float) -> float: ...
    def loss(self, seeds: Sequence[int], progress: float) -> tuple[Tensor, dict[str, float]]: ...
    def evaluate(self) -> dict[str, float]: ...


class See:
    """Tower, projector and the decoder's first layers learn to name what the patches show."""

    scenes = 32

    def __init__(self, seed: int) -> None:
        # No text takes part, so the vocabulary's size does not matter; later layers come with stage 2.
        self.model = fresh(config(64, 3, 0, 1, 2, SEEING), seed, attention.NAME).to(DTYPE)
        self.head = SeeLoss()
        self.recorder = Recorder(self.model)

    def trained(self) -> dict[str, nn.Parameter]:
        core = self.model.model
        parts = {
            "vision_tower": core.vision_tower, "multi_modal_projector": core.multi_modal_projector,
            "language_model.layers": core.language_model.layers,
        }  # fmt: skip
        named = {f"model.{part}.{n}": p for part, m in parts.items() for n, p in m.named_parameters()}
        return named | {f"head.{n}": p for n, p in self.head.named_parameters()}

    def slow(self, name: str) -> bool:
        return False

    def pace(self, progress: float) -> float:
        return 1.0

    def loss(self, seeds: Sequence[int], progress: float) -> tuple[Tensor, dict[str, float]]:
        scenes = [scene(s) for s in seeds]
        about, everything = shown(scenes), torch.arange(TOKENS).expand(len(scenes), -1)
        seen = self.model.model.vision_tower(pixels(scenes, DTYPE), output_hidden_states=True)
        features = seen.hidden_states[-2]
        emitted = self.model.model.multi_modal_projector(features[:, 1:])
        self.model.model.language_model(
            inputs_embeds=emitted, position_ids=everything + 4, use_cache=False, layout=attention.Layout(TOKENS, ())
        )
        early, colors = self.head.early(emitted, about)
        settle = SETTLE * min(1.0, progress / 0.5)
        late, names = self.head.late(self.recorder.visual(0, TOKENS)[0], about, everything, settle)
        loss = early + late + self.head.summary(features[:, 0], seen.pooler_output, about)
        return loss, colors | names

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        return {f"held_{k}": v for k, v in self.loss(range(CHECK_SEEDS, CHECK_SEEDS + 100), 1.0)[1].items()}


def build(stage: str, out: Path, seed: int) -> Stage:
    if stage == "see":
        return See(seed)
    from prunekit_evals.studies.micro.glance import Glance
    from prunekit_evals.studies.micro.read import Read

    seen = load_file(out / "see.safetensors")
    return Read(seed, seen) if stage == "read" else Glance(seed, seen | load_file(out / "read.safetensors"))
