"""Videos for tests of strategies: clips of any number of frames in lists, what is equal in them, and tiny models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from random import Random
from typing import Any, ClassVar
from zlib import crc32

import pytest
import torch
from plain import Sample, shares
from torch import Tensor

from prunekit.testing.checks import CHECKS
from prunekit.testing.contract import StrategyContract
from prunekit.testing.tiny_families import tiny_batch, tiny_model
from prunekit.verify import tiny_prompts

SEEDS = range(60)
FAMILIES = ("llava_next_video", "llava_onevision", "qwen2_5_vl", "qwen3_vl")
# What depends on the model; to the other rules a strategy is held on LLaVA, by `tests/contract`.
HELD = {
    "prefill", "decoding", "kv-lengths", "sites", "text-stays", "same-result", "rows-alone", "after-others",
    "before-others",
}  # fmt: skip


@dataclass(frozen=True)
class ClipSample(Sample):
    """videos: whether each token is of a video. Tied samples repeat tokens, in time and in space."""

    videos: list[bool] = field(default_factory=list)

    @property
    def places(self) -> dict[str, Tensor]:
        return {**super().places, "videos": torch.tensor(self.videos)}

    def vectors(self, size: int = 8, signs: bool = True) -> list[list[float]]:
        """One for each token, near to that at its place before; tied ones are of few kinds.

        signs: kinds are of ones and minus ones, whose cosines are exact; else no two distances are equal by symmetry.
        """
        one = (lambda: float(self.draw.choice((-1, 1)))) if signs else (lambda: self.draw.gauss(0.3, 1.0))
        kinds = [[one() for _ in range(size)] for _ in range(4)]
        rows: list[list[float]] = []
        for i in range(len(self)):
            before = [j for j in range(i) if self.coords[j] == self.coords[i] and self.frames[j] < self.frames[i]]
            last = rows[before[-1]] if before else None
            if self.tied:
                rows.append(last if last is not None and self.draw.random() < 0.6 else self.draw.choice(kinds))
            else:
                step = self.draw.choice((0.1, 1.0))
                rows.append([0.8 * a + self.draw.gauss(0.1, step) for a in last or [self.draw.gauss(0, 1)] * size])
        return rows

    def clips(self, count: int | None) -> tuple[list[int], list[tuple[list[int], int | None]]]:
        """Who stays without a choice, and the clips with how many of them stay."""
        keys = [(self.coords[i][0], 0 if self.videos[i] else self.frames[i]) for i in range(len(self))]
        clips = [
            [i for i in range(len(self)) if keys[i] == key and self.coords[i][1] >= 0] for key in sorted(set(keys))
        ]
        clips = [clip for clip in clips if clip]
        if count is None:
            asked = [(clip, None) for clip in clips if self.videos[clip[0]]]
            return [i for i in range(len(self)) if not any(i in clip for clip, _ in asked)], asked
        wanted = shares(count, [len(clip) for clip in clips])
        stay = self.newlines[: count - sum(wanted)]
        stay += [i for clip, share in zip(clips, wanted, strict=True) if share == len(clip) for i in clip]
        return stay, [(clip, n) for clip, n in zip(clips, wanted, strict=True) if 0 < n < len(clip)]

    def by_frame(self, clip: list[int]) -> list[list[int]]:
        """Its tokens frame by frame."""
        present = sorted({self.frames[i] for i in clip})
        return [[i for i in clip if self.frames[i] == frame] for frame in present]


def clip_sample(seed: int) -> ClipSample:
    """One video, several, or videos and images in crops; with newlines behind them or not; every third is thinned.

    Seeds that are divisible by 10 give one token alone, those that leave 1 keep everything.
    """
    draw = Random(seed)
    coords, frames, videos = [], [], []
    for visual in range(draw.choice((1, 1, 2))):
        video = visual == 0 or draw.random() < 0.5
        rows, columns, number = draw.randint(1, 4), draw.randint(1, 4), draw.randint(1, 7 if video else 3)
        for frame in range(number):
            places = [(row, column) for row in range(rows) for column in range(columns)]
            coords += [(visual, *place, rows, columns) for place in places]
            frames += [frame] * len(places)
        if draw.random() < 0.4:
            coords.append((visual, -1, -1, rows, columns))
            frames.append(number - 1)
        videos += [video] * (len(coords) - len(videos))
    stay = [i for i in range(len(coords)) if seed % 3 or draw.random() < 0.7] or [0]
    stay = stay[:1] if seed % 10 == 0 else stay
    count = len(stay) if seed % 10 == 1 else draw.randint(1, len(stay))
    kept = [[table[i] for i in stay] for table in (coords, frames, videos)]
    return ClipSample(kept[0], kept[1], count, seed % 2 == 0, draw, kept[2])  # type: ignore[arg-type]


def grid_of(frames: int, rows: int, columns: int) -> dict[str, Tensor]:
    """`coords`, `frames` and `videos` of one complete video, as a hook gets them."""
    places = torch.cartesian_prod(torch.arange(frames), torch.arange(rows), torch.arange(columns)).view(-1, 3)
    size = torch.tensor([rows, columns]).expand(len(places), 2)
    coords = torch.cat([torch.zeros(len(places), 1, dtype=torch.int64), places[:, 1:], size], 1)
    return {"coords": coords, "frames": places[:, 0], "videos": torch.ones(len(places), dtype=torch.bool)}


model_of = cache(tiny_model)


def on_videos(use: str, options: Mapping[str, Any] | None = None, keep: float | None = 0.4) -> dict[str, type[Any]]:
    """The contract of token strategies on each family that takes videos, of which a row holds several, and an image.

    One family runs always, another one for each strategy; the rest are slow. keep: None for strategies that take none.
    """
    members: dict[str, Any] = {"use": use, "options": options or {}, "keep": {} if keep is None else {"keep": keep}}
    members["without"] = {one.name: "is held on LLaVA" for one in CHECKS if one.name not in HELD}
    often = FAMILIES[crc32(use.encode()) % len(FAMILIES)]
    marks = {family: {} if family == often else {"pytestmark": pytest.mark.slow} for family in FAMILIES}
    names = {family: f"Test_{use}_{family}" for family in FAMILIES}
    return {
        name: type(name, (_OnVideos,), members | {"family": family} | marks[family]) for family, name in names.items()
    }


class _OnVideos(StrategyContract):
    family: ClassVar[str]

    def model(self) -> Any:
        return model_of(self.family)

    def inputs(self, images: Sequence[int] = (1, 2), text: Sequence[int] = (9, 12)) -> Any:
        rows: list[Any] = [("video",) * number for number in images]
        last = (*rows[-1], "image") if any(images) else rows[-1]
        return tiny_batch(self.model(), [*rows[:-1], last], text=text)

    def row(self, inputs: Any, row: int) -> Any:
        return tiny_prompts.row_of(inputs, row)
