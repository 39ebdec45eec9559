"""What is known of a prompt batch before the decoder runs: ids, padding, visual tokens and what they show."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from prunekit.engine.prompt.visual_inputs import VisualInputs
from prunekit.engine.tokens.layout import blank, leftmost, take
from prunekit.errors import Unsupported


@dataclass(frozen=True)
class VisualInput:
    """One image or video of a row: number `at` of what `source` encoded; `positions` in the prompt, int64 (tokens,)."""

    source: VisualInputs
    at: int
    positions: Tensor


@dataclass(frozen=True)
class Prompt:
    """What is known of a prompt batch before the decoder runs.

    ids: int64 (B, S). real, visual: bool (B, S), not padding; replaced by image or video features. visual_counts,
    lengths: per row, visual tokens, and tokens without padding. sources: what was encoded for the batch, per modality.
    """

    ids: Tensor
    real: Tensor
    visual: Tensor
    visual_counts: tuple[int, ...]
    lengths: tuple[int, ...]
    sources: tuple[VisualInputs, ...]

    @cached_property
    def ordinals(self) -> Tensor:
        """For each visual position its number among the row's visual tokens: int64 (B, S)."""
        return self.visual.cumsum(1) - 1

    @cached_property
    def last(self) -> Tensor:
        """Position of each row's last token that is no padding: int64 (B,)."""
        positions = torch.arange(self.real.shape[1], device=self.real.device)
        return (self.real * positions).argmax(1)

    @cached_property
    def by_row(self) -> list[list[VisualInput]]:
        """The images and videos of each row in the order of the prompt."""
        rows: list[list[VisualInput]] = [[] for _ in self.visual_counts]
        for source in self.sources:
            for row, numbers in enumerate(self._dealt(source)):
                shown = torch.isin(self.ids[row], torch.tensor(source.modality.token_ids, device=self.ids.device))
                positions = (shown & self.real[row]).nonzero()[:, 0]
                parts = torch.split(positions, [source.counts[number] for number in numbers])
                rows[row] += [VisualInput(source, n, part) for n, part in zip(numbers, parts, strict=True)]
        return [sorted(row, key=lambda one: int(one.positions[0])) for row in rows]

    def _dealt(self, source: VisualInputs) -> list[list[int]]:
        """Which entries of `source` each row shows. Rows are repeated for beams, records are not."""
        ids = torch.tensor(source.modality.token_ids, device=self.ids.device)
        wanted = (torch.isin(self.ids, ids) & self.real).sum(1).tolist()
        total = sum(source.counts)
        times = sum(wanted) // total if total else 1
        if times < 1 or total * times != sum(wanted) or len(wanted) % times:
            raise Unsupported(f"the prompt shows {sum(wanted)} {source.modality.name} tokens, the encoder made {total}")
        # Some encoders return an empty entry for a row without images.
        remaining = [number for number, count in enumerate(source.counts) if count]
        rows: list[list[int]] = []
        for row, count in enumerate(wanted):
            if row % times:
                rows.append(rows[-1])
                continue
            numbers: list[int] = []
            while remaining and sum(source.counts[n] for n in numbers) < count:
                numbers.append(remaining.pop(0))
            rows.append(numbers)
        return rows

    @cached_property
    def coords(self) -> Tensor:
        """Number of the image or video, then as `VisualInputs.coords`, of original visual tokens: int64 (B, V, 10);
        padding is -1.
        """
        table = torch.full((*self.ids.shape, 10), -1, dtype=torch.int64)
        for b, row in enumerate(self.by_row):
            for number, one in enumerate(row):
                positions = one.positions.cpu()
                table[b, positions, 0] = number
                table[b, positions, 1:] = one.source.coords[one.at].cpu()
        return self.of_visual(table.to(self.ids.device), -1)

    @cached_property
    def videos(self) -> Tensor:
        """Which original visual tokens are of a video: bool (B, V)."""
        table = torch.zeros_like(self.visual)
        for b, row in enumerate(self.by_row):
            for one in row:
                table[b, one.positions] = one.source.modality.name == "video"
        return self.of_visual(table, False)

    def of_visual(self, table: Tensor, padding: float) -> Tensor:
        """Entries of a table (B, S, ...) for the original visual tokens: (B, V, ...)."""
        width = max(self.visual_counts, default=0)
        columns = leftmost(self.visual, width)
        return blank(take(table, columns, 1), self.visual.gather(1, columns), padding)

    @cached_property
    def seeds(self) -> tuple[int, ...]:
        """One number per row from its token ids and pixels alone, so that it is the same in every batch and run."""
        ids, real = self.ids.tolist(), self.real.tolist()
        return tuple(map(_seed, ids, real, self.by_row))


def _seed(ids: Sequence[int], real: Sequence[bool], inputs: Sequence[VisualInput]) -> int:
    digest = hashlib.blake2b(digest_size=7)
    digest.update(repr([token for token, is_real in zip(ids, real, strict=True) if is_real]).encode())
    sums = [one.source.checksums for one in inputs]
    digest.update(repr([None if s is None else s[p.at] for s, p in zip(sums, inputs, strict=True)]).encode())
    return int.from_bytes(digest.digest(), "big")
