"""Compose scenes: icons on a 4x4 lattice over a cluttered procedural background."""

import functools
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .lexicon import COLOR_NAMES, HEIGHTS, SIDES, THEMES
from .sprites import sprite

IMAGE_SIZE = 168  # pixels
PATCH_SIZE = 14
GRID = IMAGE_SIZE // PATCH_SIZE  # 12 patches a side, 144 in all
LATTICE = 4
CELL = IMAGE_SIZE // LATTICE  # 42 pixels: three patches
SIZES = tuple(range(28, 42, 3))  # icon sizes in pixels
CHECK_SEEDS = 1 << 30  # scenes that only watch the training; the benchmark's and the training's are elsewhere


@dataclass(frozen=True)
class Thing:
    """One icon: what it is, its color, and its box ``(left, top, size)`` in pixels."""

    noun: str
    color: str
    box: tuple[int, int, int]

    @property
    def side(self) -> str:
        return SIDES[(self.box[0] + self.box[2] // 2) * 2 // IMAGE_SIZE]

    @property
    def height(self) -> str:
        return HEIGHTS[(self.box[1] + self.box[2] // 2) * 2 // IMAGE_SIZE]

    @property
    def place(self) -> str:
        return f"{self.height} {self.side}"


@dataclass(frozen=True, eq=False)
class Scene:
    """A picture (uint8 ``[168, 168, 3]``) and the things in it; nouns in a scene are distinct."""

    seed: int
    theme: str
    image: np.ndarray
    objects: tuple[Thing, ...]


@functools.cache
def _popularity(n: int) -> np.ndarray:
    weight = 1.0 / np.arange(2, n + 2) ** 0.7
    return weight / weight.sum()


def draw_nouns(rng: np.random.Generator, theme: str, count: int) -> list[str]:
    """Distinct nouns, 60 % of them from the scene's theme, popular ones more often."""
    nouns: list[str] = []
    themes = list(THEMES)
    while len(nouns) < count:
        source = theme if rng.random() < 0.6 else themes[rng.integers(len(themes))]
        names = list(THEMES[source])
        noun = names[rng.choice(len(names), p=_popularity(len(names)))]
        if noun not in nouns:
            nouns.append(noun)
    return nouns


def _background(rng: np.random.Generator) -> np.ndarray:
    """Muted clutter: two scales of smooth noise and a few grey slabs; float32 ``[168, 168, 3]``."""
    base = rng.uniform(50, 165) + rng.uniform(-22, 22, 3)
    coarse = base + rng.normal(0, 20, (7, 7, 1)) + rng.normal(0, 7, (7, 7, 3))
    image = np.array(
        Image.fromarray(coarse.clip(0, 255).astype(np.uint8)).resize((IMAGE_SIZE, IMAGE_SIZE), Image.BICUBIC),
        np.float32,
    )
    for _ in range(rng.integers(3, 9)):
        x, y = rng.integers(0, IMAGE_SIZE - 10, 2)
        w, h = rng.integers(4, 60, 2)
        image[y : y + h, x : x + w] += rng.uniform(-38, 38) + rng.uniform(-10, 10, 3)
    grain = rng.integers(-14, 15, (IMAGE_SIZE // 2, IMAGE_SIZE // 2, 1)).astype(np.float32)
    return image + grain.repeat(2, 0).repeat(2, 1)


def scene(seed: int) -> Scene:
    """The scene of a seed: 3 to 6 things, each inside one lattice cell, so that its quadrant is clear."""
    rng = np.random.default_rng(seed)
    theme = list(THEMES)[rng.integers(len(THEMES))]
    nouns = draw_nouns(rng, theme, int(rng.integers(3, 7)))
    image = _background(rng)
    things = []
    for noun, cell in zip(nouns, rng.permutation(LATTICE * LATTICE), strict=False):
        size = SIZES[rng.integers(len(SIZES))]
        dx, dy = rng.integers(0, CELL - size + 1, 2)
        left, top = int(cell % LATTICE * CELL + dx), int(cell // LATTICE * CELL + dy)
        thing = Thing(noun, COLOR_NAMES[rng.integers(len(COLOR_NAMES))], (left, top, size))
        color, keep = sprite(thing.noun, thing.color, size)
        region = image[top : top + size, left : left + size]
        region *= keep
        region += color
        things.append(thing)
    return Scene(seed, theme, image.clip(0, 255).astype(np.uint8), tuple(things))


def patch_owner(shown: Scene, least: float = 0.15) -> np.ndarray:
    """Which thing each patch shows: int64 ``[144]``, an index into ``objects``, or -1 for background.

    A patch counts as a thing's own when the icon covers at least ``least`` of it.
    """
    owner = np.full((GRID, GRID), -1, np.int64)
    for i, thing in enumerate(shown.objects):
        left, top, size = thing.box
        cover = np.zeros((CELL, CELL), np.float32)
        x0, y0 = left // CELL * CELL, top // CELL * CELL
        cover[top - y0 : top - y0 + size, left - x0 : left - x0 + size] = 1 - sprite(*_key(thing))[1][..., 0]
        share = cover.reshape(3, PATCH_SIZE, 3, PATCH_SIZE).mean((1, 3))
        block = owner[y0 // PATCH_SIZE : y0 // PATCH_SIZE + 3, x0 // PATCH_SIZE : x0 // PATCH_SIZE + 3]
        block[share >= least] = i
    return owner.reshape(-1)


def _key(thing: Thing) -> tuple[str, str, int]:
    return thing.noun, thing.color, thing.box[2]
