"""What a vision tower did for each image or video, counted from what was decided when somebody asks for the cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from prunekit.cost import TowerWork
from prunekit.engine.tower.patches import Patches
from prunekit.errors import Unsupported
from prunekit.families.base import Modality
from prunekit.families.tower_parts import Tower

# Tokens that attended, squares of those that attended to each other, tokens through the MLP: of one block.
Block = tuple[int, int, int]


@dataclass(frozen=True)
class Effort:
    """One call of an encoding method.

    arguments, counts: as it was called, and the visual tokens of each image or video. shape: rows and tokens of the
    tower's batch. attending, passing: for each block, the visual tokens that remain in its attention and in its MLP,
    bool (B, V); blocks that are not named run on all. merged: the same of what each of the mergers made. embedded:
    those whose patches became states; remaining: those that no cut has dropped. Each None: all. projected: tokens of
    each row that came to the projector; fewer: of them, those that remained were mapped.
    """

    tower: Tower
    modality: Modality
    arguments: Mapping[str, Any]
    counts: tuple[int, ...]
    shape: tuple[int, int] | None = None
    attending: Mapping[int, Tensor] | None = None
    passing: Mapping[int, Tensor] | None = None
    embedded: Tensor | None = None
    merged: Mapping[int, Tensor] | None = None
    remaining: Tensor | None = None
    projected: int = 0
    fewer: bool = False

    @cached_property
    def works(self) -> tuple[TowerWork, ...] | None:
        """What was done for each image or video; None where that cannot be told."""
        try:
            return self._packed() if self.tower.packed else self._by_row()
        except Unsupported:  # visual tokens that are no whole patches, say
            return None

    def _packed(self) -> tuple[TowerWork, ...]:
        """All images are one sequence, and each attends within its parts."""
        tower, per = self.tower, self.tower.images.merge**2 if self.tower.images else 1
        blocks: list[list[Block]] = [[] for _ in self.counts]
        for number in range(len(tower.layers)):
            parts = [torch.zeros(count, dtype=torch.int64) for count in self.counts]
            if tower.parts is not None:
                parts = tower.parts(self.modality.name, self.arguments, number)
            attending, passing = self._alive(self.attending, number), self._alive(self.passing, number)
            for of_input, part, alive, fed in zip(blocks, parts, attending, passing, strict=True):
                counts = torch.bincount(part[alive]) * per
                of_input.append((int(counts.sum()), int((counts**2).sum()), int(fed.sum()) * per))
        merged = [self._alive(self.merged, number) for number in range(len(tower.mergers))]
        return tuple(
            TowerWork(
                int(embedded.sum()) * per,
                tuple(blocks[number]),
                merged=tuple(int(one[number].sum()) for one in merged),
            )
            for number, embedded in enumerate(self._tables(self.embedded))
        )

    def _by_row(self) -> tuple[TowerWork, ...] | None:
        """Each crop or frame is a row, which attends to itself. None where the tower's batch is not known."""
        tower = self.tower
        if self.shape is None:
            return None
        rows, tokens = self.shape
        patches = Patches.by(tower, self.modality.name, self.arguments, rows, tokens)
        whole = [tokens] * rows
        works = []
        lengths = [
            (self._lengths(patches, self.attending, number, whole), self._lengths(patches, self.passing, number, whole))
            for number in range(len(tower.layers))
        ]
        for number, own in enumerate(patches.rows):
            blocks = tuple(
                (sum(attending[row] for row in own), sum(attending[row] ** 2 for row in own), sum(fed[r] for r in own))
                for attending, fed in lengths
            )
            pools = len(own) if tower.pool is not None else 0
            works.append(
                TowerWork(
                    patches=len(own) * (tokens - tower.leading),
                    blocks=blocks,
                    projected=self._projected(patches, number, len(own), tokens),
                    merged=(patches.made[number],) * len(tower.mergers),
                    pools=pools,
                    pooled=pools * tokens,
                )
            )
        return tuple(works)

    def _projected(self, patches: Patches, number: int, rows: int, tokens: int) -> int:
        if not self.fewer or self.remaining is None:
            return rows * self.projected
        leading = max(self.tower.leading - (tokens - self.projected), 0)
        return int(self.remaining[number].sum()) * patches.index.shape[-1] + rows * leading

    def _lengths(
        self, patches: Patches, tables: Mapping[int, Tensor] | None, number: int, whole: Sequence[int]
    ) -> Sequence[int]:
        alive = (tables or {}).get(number)
        if alive is None:
            return whole
        assert self.shape is not None
        return patches.tokens(alive.cpu(), *self.shape).sum(1).tolist()

    def _alive(self, tables: Mapping[int, Tensor] | None, number: int) -> list[Tensor]:
        return self._tables((tables or {}).get(number))

    def _tables(self, table: Tensor | None) -> list[Tensor]:
        if table is None:
            return [torch.ones(count, dtype=torch.bool) for count in self.counts]
        return [row[:count] for row, count in zip(table.cpu(), self.counts, strict=True)]
