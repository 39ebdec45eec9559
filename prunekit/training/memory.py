"""What was tried for earlier batches, so that a router can learn from it again: one file a batch, while it trains.

Candidates cost forwards of the LVLM, a step of the router next to nothing. The files, not this process, hold what was
tried, so that a training that resumes has all of it.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from prunekit.errors import InputError
from prunekit.training.forced import Shown
from prunekit.training.recipe import Recipe
from prunekit.training.teacher import Actions, Pairs, paired

NAME = "memory"


@dataclass(frozen=True)
class Memory:
    """The batches of one process. folder: that of the training. process: its number.

    dtype: of the LVLM, in which the router's input is kept, without loss. device: where batches are needed.
    """

    folder: Path
    recipe: Recipe
    process: int
    dtype: torch.dtype
    device: torch.device

    def put(self, step: int, pairs: Pairs, seen: Shown) -> None:
        """Keep the batch of a step, if steps learn again from earlier ones at all; forget the one too far back."""
        if not self.recipe.replay:
            return
        from safetensors.torch import save_file

        tensors = {
            "embeds": seen.embeds.to(self.dtype), "visual": seen.visual, "valid": seen.valid, "kl": pairs.kl,
            "tokens": torch.stack([one.tokens for one in pairs.tried]),
            "layers": torch.stack([one.layers for one in pairs.tried]),
        }  # fmt: skip
        path = self._path(step)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, path)
        self._path(step - self.recipe.remember).unlink(missing_ok=True)

    def draw(self, step: int) -> Iterator[tuple[Pairs, Shown]]:
        """Batches to learn from once more in a step: of it and those before, the same ones in every process; at first
        no more than twice as many as there are.
        """
        known = range(max(0, step + 1 - self.recipe.remember), step + 1)
        drawn = random.Random(self.recipe.seed * 1_000_003 + step)
        for _ in range(min(self.recipe.replay, 2 * len(known))):
            yield self._read(drawn.choice(known))

    def clear(self) -> None:
        """Delete all batches, of every process."""
        shutil.rmtree(self.folder / NAME, ignore_errors=True)

    def _read(self, step: int) -> tuple[Pairs, Shown]:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self._path(step)
        try:
            held: dict[str, Tensor] = load_file(path, device=str(self.device))
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"'{path}' cannot be read, and the training learns from it again: {error} (use --restart)"
            ) from error
        tried = tuple(Actions(*both) for both in zip(held["tokens"], held["layers"], strict=True))
        return paired(tried, held["kl"], self.recipe), Shown(held["embeds"].float(), held["visual"], held["valid"])

    def _path(self, step: int) -> Path:
        return self.folder / NAME / f"{step:06d}-{self.process}.safetensors"
