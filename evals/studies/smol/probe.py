"""Held-out questions of every family, asked of a model in training: with parts left out, or without an image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import torch
from prunekit_evals.micro.compose import CHECK_SEEDS, Scene, scene
from prunekit_evals.micro.questions import FAMILIES
from prunekit_evals.studies.smol.decoder import WHOLE, Cut
from prunekit_evals.studies.smol.model import Asked, Smol
from prunekit_evals.studies.smol.rows import KINDS, Encoder, Rows, checks
from prunekit_evals.studies.smol.see import Labels, labels
from prunekit_evals.studies.smol.stages import asked, rows_right
from torch import Tensor


class Probe:
    """`count` scenes, with a question of every family that they admit."""

    def __init__(self, encoder: Encoder, count: int, batch: int) -> None:
        self.encoder, self.count, self.batch = encoder, count, batch

    @cached_property
    def scenes(self) -> list[Scene]:
        return [scene(CHECK_SEEDS + i) for i in range(self.count)]

    @cached_property
    def parts(self) -> list[tuple[Sequence[Scene], Rows]]:
        """Batches of scenes with their rows."""
        found = []
        for begin in range(0, self.count, self.batch):
            some = self.scenes[begin : begin + self.batch]
            found.append((some, self.encoder.rows(list(zip(*map(checks, some), strict=True)))))
        return found

    @cached_property
    def kinds(self) -> np.ndarray:
        """For every scene and row the family, int8 `[scenes, 24]`; that of a caption where none was admitted."""
        return np.concatenate([rows.kinds for _, rows in self.parts])

    @cached_property
    def about(self) -> list[Labels]:
        """What the patches of each batch of scenes show."""
        return [Labels.of(labels(scenes)) for scenes, _ in self.parts]

    @torch.no_grad()
    def seen(self, model: Smol, scenes: Sequence[Scene]) -> Tensor:
        images = torch.from_numpy(np.stack([s.image for s in scenes])).to(model.device)
        with model.mixed():
            return model.vision(images)[0]

    def batches(self, model: Smol, most: int | None = None) -> Iterator[tuple[Tensor, Asked]]:
        """Visual tokens and rows of the first `most` scenes, or of all."""
        for i, (scenes, rows) in enumerate(self.parts):
            if most is not None and i * self.batch >= most:
                return
            one = asked(rows, model.device)
            count = len(scenes) if most is None else min(len(scenes), most - i * self.batch)
            yield self.seen(model, scenes[:count]), Asked(one.ids[:count], one.labels[:count], one.groups)

    @torch.no_grad()
    def right(self, model: Smol, cut: Cut = WHOLE, blind: bool = False) -> np.ndarray:
        """Which questions are answered exactly, bool `[scenes, 24]`."""
        merged, found = model.decoder.merged(), []
        for visual, rows in self.batches(model):
            logits = model.answers(merged, None if blind else visual, rows, cut)
            found.append(rows_right(logits, rows).cpu().numpy())
        return np.concatenate(found)

    def by_family(self, right: np.ndarray) -> dict[str, float]:
        shares = {}
        for family in FAMILIES:
            of = self.kinds == KINDS.index(family)
            if of.any():
                shares[family] = float(right[of].mean())
        return shares

    @torch.no_grad()
    def measure(self, model: Smol, see_only: bool = False) -> dict[str, float]:
        """Held-out shares: of patches named right, and of questions of every family."""
        sums: dict[str, float] = {}
        for (scenes, _), about in zip(self.parts, self.about, strict=True):
            images = torch.from_numpy(np.stack([s.image for s in scenes])).to(model.device)
            with model.mixed():
                _, right = model.see(*model.vision(images), about.to(model.device), 1.0)
            for name, value in right.items():
                sums[name] = sums.get(name, 0.0) + float(value) * len(scenes) / self.count
        found = {f"held {name}": value for name, value in sums.items()}
        if not see_only:
            by_family = self.by_family(self.right(model))
            found |= by_family | {"mean": sum(by_family.values()) / len(by_family)}
        return found
