"""What naive twins of strategies share: one sample in plain lists, drawn from a seed, and loops over it."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

SEEDS = range(60)
Vector = Sequence[float]


@dataclass(frozen=True)
class Sample:
    """The visual tokens of one sample. coords: (image, row, column, rows, columns) each. tied: many tokens are equal.

    count: how many to keep. size: of a value that is drawn, 8 numbers.
    """

    coords: list[tuple[int, int, int, int, int]]
    frames: list[int]
    count: int
    tied: bool
    draw: random.Random

    def __len__(self) -> int:
        return len(self.coords)

    def numbers(self) -> list[float]:
        """One for each token, from 0 to 1, as attention; tied samples have few different ones."""
        return [self.draw.randrange(1, 5) / 8 if self.tied else self.draw.random() for _ in self.coords]

    def vectors(self, size: int = 8) -> list[list[float]]:
        """One for each token; tied samples draw from few, whose cosines are 0, a half or 1 without rounding."""
        kinds = [[float(self.draw.choice((-1, 1))) for _ in range(4)] + [0.0] * (size - 4) for _ in range(5)]
        return [
            list(self.draw.choice(kinds)) if self.tied else [self.draw.gauss(0.2, 1.0) for _ in range(size)]
            for _ in self.coords
        ]

    @property
    def places(self) -> dict[str, Tensor]:
        """`coords` and `frames` as a hook gets them."""
        return {"coords": torch.tensor(self.coords), "frames": torch.tensor(self.frames)}

    @property
    def crops(self) -> list[list[int]]:
        """The tokens of each crop that shows something, in order."""
        keys = sorted({(at[0], frame) for at, frame in zip(self.coords, self.frames, strict=True) if at[1] >= 0})
        return [
            [i for i, at in enumerate(self.coords) if at[1] >= 0 and (at[0], self.frames[i]) == key] for key in keys
        ]

    @property
    def newlines(self) -> list[int]:
        return [i for i, at in enumerate(self.coords) if at[1] < 0]


def sample(seed: int, newlines: bool = True, images: int = 2, thinned: bool = True) -> Sample:
    """One or two images of one to three crops, some with newlines; every third one has lost tokens before.

    Seeds that are divisible by 10 give one token alone, those that leave 1 keep everything.
    """
    draw = random.Random(seed)
    coords, frames = [], []
    for image in range(draw.randint(1, images)):
        for frame in range(draw.randint(1, 3)):
            rows, columns = draw.randint(1, 5), draw.randint(1, 5)
            newline = newlines and draw.random() < 0.3
            for row in range(rows):
                places = [(row, column) for column in range(columns)] + [(-1, -1)] * newline
                coords += [(image, *place, rows, columns) for place in places]
                frames += [frame] * len(places)
    stay = [i for i in range(len(coords)) if not (thinned and seed % 3 == 0) or draw.random() < 0.6] or [0]
    if seed % 10 == 0:
        stay = stay[:1]
    count = len(stay) if seed % 10 == 1 else draw.randint(1, len(stay))
    return Sample([coords[i] for i in stay], [frames[i] for i in stay], count, seed % 2 == 0, draw)


def best(items: Iterable[int], value: Callable[[int], float], count: int) -> list[int]:
    """The `count` items of largest value, on ties the lower one first."""
    return sorted(items, key=lambda i: (-value(i), i))[:count]


def cosine(x: Vector, y: Vector) -> float:
    length = math.sqrt(sum(a * a for a in x)) * math.sqrt(sum(b * b for b in y))
    return sum(a * b for a, b in zip(x, y, strict=True)) / length if length else 0.0


def greedy(items: Sequence[int], count: int, gain: Callable[[int, Sequence[int]], float]) -> list[int]:
    """Always the item with the largest `gain(item, chosen so far)`, the lower one on ties."""
    chosen: list[int] = []
    while len(chosen) < min(count, len(items)):
        now = tuple(chosen)
        chosen += best((i for i in items if i not in now), lambda i, now=now: gain(i, now), 1)
    return chosen


def covering(items: Sequence[int], count: int, rows: Sequence[Vector], saliency: Vector) -> list[int]:
    """Facility location: rows of how well each item covers one target."""
    had, chosen = [0.0] * len(rows), []
    while len(chosen) < min(count, len(items)):
        gains = {
            i: saliency[i] * sum(max(0.0, row[i] - one) for row, one in zip(rows, had, strict=True))
            for i in items
            if i not in chosen
        }
        chosen += best(gains, gains.__getitem__, 1)
        had = [max(row[chosen[-1]], one) for row, one in zip(rows, had, strict=True)]
    return chosen


def softmax(values: Vector) -> list[float]:
    exponents = [math.exp(one - max(values)) for one in values]
    return [one / sum(exponents) for one in exponents]


def shares(count: int, sizes: Sequence[int]) -> list[int]:
    """`count` in proportion to the sizes: rounded down, then one more each for the largest remainders."""
    total = sum(sizes)
    ideal = [Fraction(size * min(count, total), total) if total else Fraction(0) for size in sizes]
    whole = [math.floor(one) for one in ideal]
    for group in best(range(len(sizes)), lambda g: ideal[g] - whole[g], min(count, total) - sum(whole)):
        whole[group] += 1
    return whole


def spread(one: Sample) -> list[tuple[list[int], int]]:
    """The crops with their shares, and the newlines with what is left over."""
    crops = one.crops
    wanted = shares(one.count, [len(crop) for crop in crops])
    return [*zip(crops, wanted, strict=True), (one.newlines, one.count - sum(wanted))]


def kept(mask: Tensor) -> list[int]:
    return mask.nonzero()[:, 0].tolist()
