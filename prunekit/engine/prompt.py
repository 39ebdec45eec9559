"""What is known of a prompt batch before the decoder runs: ids, padding, where the visual tokens are, which images."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Prompt:
    """What is known of a prompt batch before the decoder runs.

    ids: int64 (B, S). real, visual: bool (B, S), not padding; filled with image features. visual_counts, lengths: per
    row,
    visual tokens, and tokens without padding. images: for each image in order, its visual tokens and a checksum of its
    pixels, which is an int64 tensor of one element, or None where only encoded features were given.
    """

    ids: Tensor
    real: Tensor
    visual: Tensor
    visual_counts: tuple[int, ...]
    lengths: tuple[int, ...]
    images: tuple[tuple[int, Tensor | None], ...]

    @cached_property
    def ordinals(self) -> Tensor:
        """For each visual position its number among the row's visual tokens: int64 (B, S)."""
        return self.visual.cumsum(1) - 1

    @cached_property
    def last(self) -> Tensor:
        """Position of each row's last token that is no padding: int64 (B,)."""
        places = torch.arange(self.real.shape[1], device=self.real.device)
        return (self.real * places).argmax(1)

    def row_images(self) -> list[list[tuple[int, Tensor | None]]]:
        """The images of each row."""
        remaining = list(self.images)
        rows: list[list[tuple[int, Tensor | None]]] = []
        for count in self.visual_counts:
            row: list[tuple[int, Tensor | None]] = []
            while remaining and sum(tokens for tokens, _ in row) < count:
                row.append(remaining.pop(0))
            rows.append(row)
        return rows

    def coords(self, grid: Callable[[int], Tensor]) -> Tensor:
        """Image, row, column, rows, columns of every original visual token: int64 (B, V, 5), padding -1."""
        table = torch.full((len(self.visual_counts), max(self.visual_counts), 5), -1, dtype=torch.int64)
        for b, images in enumerate(self.row_images()):
            start = 0
            for number, (tokens, _) in enumerate(images):
                places = grid(tokens)
                here = table[b, start : start + tokens]
                here[:, 0], here[:, 1:3], here[:, 3:] = number, places, places.amax(0) + 1
                start += tokens
        return table.to(self.ids.device)

    @cached_property
    def seeds(self) -> tuple[int, ...]:
        """One number per row from its token ids and pixels alone, so that it is the same in every batch and run."""
        ids, real = self.ids.tolist(), self.real.tolist()
        seeds = []
        for row, mask, images in zip(ids, real, self.row_images(), strict=True):
            digest = hashlib.blake2b(digest_size=7)
            digest.update(repr([token for token, there in zip(row, mask, strict=True) if there]).encode())
            digest.update(repr([None if key is None else int(key) for _, key in images]).encode())
            seeds.append(int.from_bytes(digest.digest(), "big"))
        return tuple(seeds)


def pixel_checksum(pixels: Tensor) -> Tensor:
    """One int64 per image from the bits of its pixels, float (images, ...); order matters, the batch does not."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[pixels.element_size()]
    flat = pixels.detach().contiguous().view(bits).flatten(1).to(torch.int64)
    return (flat * (torch.arange(flat.shape[1], device=flat.device) % 8191 + 1)).sum(1)
