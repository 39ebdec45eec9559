"""Which patches of the vision tower make which visual token: pure tensors.

The tower's batch has R rows, one for each crop or video frame, of T tokens: leading ones such as CLS, then patches.
Outside of a block its states keep that shape; inside, a block runs on the tokens that remain, as in token merging
(https://arxiv.org/abs/2210.09461).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from prunekit.engine.attention.attended import wide
from prunekit.engine.tokens.layout import Layout, blank, leftmost
from prunekit.families.tower_parts import Tower


@dataclass(frozen=True, eq=False)
class Patches:
    """The visual tokens of each image or video in tokens of the tower.

    index: int64 (B, V, p), numbers of tokens through all rows (row * T + token), 0 where there is none. present: bool
    (B, V), visual tokens that have patches. counts: of each input, all its visual tokens; made: those with patches.
    rows: the rows of each input, in order.
    """

    index: Tensor
    present: Tensor
    counts: tuple[int, ...]
    made: tuple[int, ...]
    rows: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, tables: Sequence[Tensor], tokens: int, leading: int) -> Patches:
        """From int64 (V, p) for each input, numbers of patches through all rows, -1 where there is none."""
        patches = tokens - leading
        counts = tuple(len(table) for table in tables)
        width = max(table.shape[1] for table in tables)
        padded = torch.full((len(tables), max(counts), width), -1, dtype=torch.int64)
        for number, table in enumerate(tables):
            padded[number, : len(table), : table.shape[1]] = table.cpu()
        present = (padded >= 0).any(-1)
        index = (padded // patches) * tokens + leading + padded % patches
        rows = tuple(tuple(sorted(set((table[table >= 0] // patches).tolist()))) for table in tables)
        return cls(index.masked_fill(padded < 0, 0), present, counts, tuple(present.sum(1).tolist()), rows)

    @classmethod
    def by(cls, tower: Tower, modality: str, arguments: Mapping[str, Any], rows: int, tokens: int) -> Patches:
        """As a tower's `patch_groups` say of a batch of so many rows, each of so many tokens."""
        if tower.patch_groups is None:
            return cls.plain(rows, tokens, tower.leading)
        return cls.of(tower.patch_groups(modality, arguments, rows, tokens - tower.leading), tokens, tower.leading)

    @classmethod
    def plain(cls, rows: int, tokens: int, leading: int) -> Patches:
        """A row is an image, a patch a visual token."""
        patches = tokens - leading
        return cls.of(list(torch.arange(rows * patches).view(rows, patches, 1)), tokens, leading)

    def tokens(self, alive: Tensor, rows: int, tokens: int) -> Tensor:
        """Which tokens of the tower remain when of the visual ones those in bool (B, V) do: bool (rows, tokens)."""
        flat = torch.ones(rows * tokens, dtype=torch.bool, device=alive.device)
        gone = self.index[self.present.to(self.index.device) & ~alive.to(self.index.device)].flatten()
        return flat.index_fill(0, gone.to(alive.device), False).view(rows, tokens)

    def to(self, device: torch.device) -> Patches:
        """On another device."""
        return replace(self, index=self.index.to(device), present=self.present.to(device))

    def take(self, x: Tensor) -> Tensor:
        """Of (R, T, ...) the patches of each visual token, (B, V, p, ...)."""
        return x.flatten(0, 1)[self.index.to(x.device)]

    def mean(self, x: Tensor) -> Tensor:
        """Of (R, T, ...) the mean over the patches of each visual token, (B, V, ...), of several in at least float32;
        zeros where there are none.
        """
        patches = self.take(x)
        return blank(patches[:, :, 0] if patches.shape[2] == 1 else wide(patches).mean(2), self.present)

    def put(self, values: Tensor, chosen: Tensor, into: Tensor) -> Tensor:
        """(R, T, ...) with `values` (B, V, p, ...) at the patches of the chosen visual tokens, bool (B, V)."""
        flat, chosen = into.flatten(0, 1), chosen.to(into.device)
        return flat.index_put((self.index.to(into.device)[chosen],), values[chosen].to(into.dtype)).view_as(into)

    def first_of(self, x: Tensor) -> Tensor:
        """Of (R, T, ...) the first token of each row of an input, (B, E, ...), zeros behind those with fewer rows."""
        table = x.new_zeros(len(self.rows), max(map(len, self.rows)), *x.shape[2:])
        for number, rows in enumerate(self.rows):
            table[number, : len(rows)] = x[list(rows), 0]
        return table


def layout_of(present: Tensor, lengths: Sequence[int], sizes: Tensor | None) -> Layout:
    """The layout of the tokens that remain in each row, left-aligned; short rows are filled with dropped ones.

    present: bool (R, T). lengths: its sums, on the host. sizes: float (R, T), as `Layout.sizes` has them by slot.
    """
    index = leftmost(present, max(*lengths, 1))
    valid = present.gather(1, index) if min(lengths) < index.shape[1] else None
    return Layout(index, valid, present.shape[1], None if sizes is None else sizes.gather(1, index))
