"""Prompts for tests of strategies: where tokens of one or several images are, whole, in tiles, thinned; and scores."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """What hooks get of where visual tokens are; the same as lists for loops."""

    coords: Tensor
    frames: Tensor
    places: Tensor

    def __len__(self) -> int:
        return len(self.coords)

    @property
    def places_as_named(self) -> dict[str, Tensor]:
        return {"coords": self.coords, "frames": self.frames, "places": self.places}

    def crops(self) -> list[list[int]]:
        """Tokens of each crop, in the order of images and crops, without those that show nothing."""
        rows = list(zip(self.coords.tolist(), self.frames.tolist(), strict=True))
        names = sorted({(place[0], frame) for place, frame in rows if place[1] >= 0})
        return [
            [i for i, (place, frame) in enumerate(rows) if (place[0], frame) == name and place[1] >= 0]
            for name in names
        ]

    def newlines(self) -> list[int]:
        return [i for i, place in enumerate(self.coords.tolist()) if place[1] < 0]


def grid(rows: int, columns: int, image: int = 0, frame: int = 0) -> list[tuple[int, ...]]:
    """Frame, coords and places of one view."""
    return [(frame, image, y, x, rows, columns, y, x, rows, columns) for y in range(rows) for x in range(columns)]


def tiled(side: int, rows: list[int], columns: list[int], image: int = 0) -> list[tuple[int, ...]]:
    """A whole of side x side, then joined tiles of so many rows and columns of tokens, a newline behind each row."""
    table, size = grid(side, side, image), (sum(rows), sum(columns))
    for i, height in enumerate(rows):
        for y in range(height):
            for j, width in enumerate(columns):
                place = 1 + i * len(columns) + j, image, sum(rows[:i]) + y
                table += [
                    (*place[:2], y, x, height, width, place[2], sum(columns[:j]) + x, *size) for x in range(width)
                ]
            table.append((1 + i * len(columns) + len(columns) - 1, image, -1, -1, height, columns[-1], -1, -1, *size))
    return table


def layout(table: list[tuple[int, ...]]) -> Layout:
    whole = torch.tensor(table)
    return Layout(whole[:, 1:6], whole[:, 0], whole[:, 6:])


def drawn_layout(rng: Random) -> Layout:
    """One image or several, of any size down to one token, in tiles or not, sometimes thinned by an earlier stage."""
    table: list[tuple[int, ...]] = []
    for image in range(rng.choice([1, 1, 2, 3])):
        if rng.random() < 0.4:
            side = rng.randint(2, 4)
            down, across = rng.choice([(1, 2), (2, 1), (2, 2), (1, 3)])
            table += tiled(side, [rng.randint(1, side)] * down, [rng.randint(1, side)] * across, image)
        else:
            table += grid(rng.randint(1, 6), rng.randint(1, 6), image)
    if rng.random() < 0.4:
        table = [one for one in table if rng.random() < 0.7] or table[:1]
    return layout(table)


def drawn_scores(rng: Random, tokens: int) -> Tensor:
    """float64 (tokens,): above 0, in sixteenths with many ties, or without."""
    if rng.random() < 0.5:
        return torch.tensor([rng.randint(1, 6) / 16 for _ in range(tokens)], dtype=torch.float64)
    return torch.tensor([rng.random() for _ in range(tokens)], dtype=torch.float64)


def drawn_features(rng: Random, tokens: int) -> Tensor:
    """float64 (tokens, 4): signs, whose cosines are exact and often equal, or normal numbers."""
    if rng.random() < 0.5:
        return torch.tensor([[rng.choice([-1.0, 1.0]) for _ in range(4)] for _ in range(tokens)], dtype=torch.float64)
    return torch.tensor([[rng.gauss(0, 1) for _ in range(4)] for _ in range(tokens)], dtype=torch.float64)


def drawn_count(rng: Random, tokens: int) -> int:
    return rng.choice([1, 2, tokens, max(tokens - 1, 1), rng.randint(1, tokens)])
