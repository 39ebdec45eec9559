"""Compose scenes: icons and signs of many sizes, placed freely over a cluttered procedural background."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from PIL import Image
from prunekit_evals.micro.letters import ink
from prunekit_evals.micro.lexicon import COLOR_NAMES, COLORS, HEIGHTS, SIDES, SIGNS, THEMES
from prunekit_evals.micro.sprites import sprite

IMAGE_SIZE = 168  # pixels
PATCH_SIZE = 14
GRID = IMAGE_SIZE // PATCH_SIZE  # patches a side
TOKENS = GRID * GRID  # visual tokens of one image, 144
SIZES = tuple(range(32, 53, 2))  # icon sizes in pixels
LETTERS = tuple(range(18, 25, 2))  # heights of a sign's letters in pixels
MARGIN = 4  # pixels of plate around the letters
GAP = 2  # pixels between two things
CLEAR = 8  # pixels between a thing's middle and the image's, for its side to be beyond doubt
CHECK_SEEDS = 1 << 30  # scenes that measure progress; the benchmark's and the training's are elsewhere


@dataclass(frozen=True)
class Thing:
    """One icon or sign: its noun (a sign's word), its color, and its box `(left, top, width, height)` in pixels."""

    noun: str
    color: str
    box: tuple[int, int, int, int]

    @property
    def middle(self) -> tuple[float, float]:
        left, top, width, height = self.box
        return left + width / 2, top + height / 2

    @property
    def side(self) -> str:
        return SIDES[int(self.middle[0] * 2 >= IMAGE_SIZE)]

    @property
    def height(self) -> str:
        return HEIGHTS[int(self.middle[1] * 2 >= IMAGE_SIZE)]

    @property
    def place(self) -> str:
        return f"{self.height} {self.side}"

    @property
    def clear(self) -> bool:
        """Whether the place is beyond doubt: the middle lies well off both axes of the image."""
        return all(abs(m - IMAGE_SIZE / 2) >= CLEAR for m in self.middle)


@dataclass(frozen=True, eq=False)
class Scene:
    """An image (uint8 `[168, 168, 3]`), its icons (of distinct nouns) and its signs (of distinct words)."""

    seed: int
    theme: str
    image: np.ndarray
    objects: tuple[Thing, ...]
    signs: tuple[Thing, ...] = ()

    @property
    def things(self) -> tuple[Thing, ...]:
        return self.objects + self.signs


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


def draw_colors(rng: np.random.Generator, objects: int, signs: int) -> list[str]:
    """Colors of icons, then of signs; two icons often share one, and half of the signs have an icon's."""
    colors = [COLOR_NAMES[i] for i in rng.permutation(len(COLOR_NAMES))[:objects]]
    if rng.random() < 0.7:
        one, other = rng.permutation(objects)[:2]
        colors[one] = colors[other]
    for _ in range(signs):
        taken = colors[objects:]
        pool = colors[:objects] if rng.random() < 0.5 else list(COLOR_NAMES)
        free = [c for c in pool if c not in taken]
        colors.append(free[rng.integers(len(free))])
    return colors


def _background(rng: np.random.Generator) -> np.ndarray:
    """Muted clutter: two scales of smooth noise and a few grey slabs; float32 `[168, 168, 3]`."""
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


def _stamp(thing: Thing) -> tuple[np.ndarray, np.ndarray]:
    """Premultiplied color `[h, w, 3]` and the share of the background that stays `[h, w, 1]`."""
    _, _, width, height = thing.box
    if thing.noun not in SIGNS:
        return sprite(thing.noun, thing.color, width)
    letters = np.pad(ink(thing.noun, height - 2 * MARGIN), MARGIN)[..., None]
    plate = np.array(COLORS[thing.color], np.float32)
    return plate * (1 - letters) + 16 * letters, np.zeros((height, width, 1), np.float32)


def _place(rng: np.random.Generator, taken: list[tuple[int, int, int, int]], width: int, height: int):
    """A box anywhere in the image that meets no other; None after some tries."""
    spots = rng.integers(0, (IMAGE_SIZE - width + 1, IMAGE_SIZE - height + 1), (60, 2))
    for left, top in spots.tolist():
        if all(
            left + width + GAP <= x or x + w + GAP <= left or top + height + GAP <= y or y + h + GAP <= top
            for x, y, w, h in taken
        ):
            return left, top, width, height
    return None


def _sizes(rng: np.random.Generator, nouns: list[str]) -> list[tuple[int, int]]:
    sizes = []
    for noun in nouns:
        if noun in SIGNS:
            letters = ink(noun, LETTERS[rng.integers(len(LETTERS))])
            sizes.append((letters.shape[1] + 2 * MARGIN, letters.shape[0] + 2 * MARGIN))
        else:
            sizes.append((SIZES[rng.integers(len(SIZES))],) * 2)
    return sizes


def scene(seed: int) -> Scene:
    """The scene of a seed: 3 to 5 icons and at most two signs, anywhere, never over each other."""
    rng = np.random.default_rng(seed)
    theme = list(THEMES)[rng.integers(len(THEMES))]
    objects, signs = int(rng.integers(3, 6)), (0, 1, 1, 2)[rng.integers(4)]
    nouns = draw_nouns(rng, theme, objects) + [SIGNS[i] for i in rng.permutation(len(SIGNS))[:signs]]
    colors = draw_colors(rng, objects, signs)
    while True:
        boxes: list[tuple[int, int, int, int]] = []
        sizes = _sizes(rng, nouns)
        for i in sorted(range(len(nouns)), key=lambda i: -sizes[i][0] * sizes[i][1]):
            box = _place(rng, boxes, *sizes[i])
            if box is None:
                break
            boxes.append(box)
        else:
            break
    order = sorted(range(len(nouns)), key=lambda i: -sizes[i][0] * sizes[i][1])
    things = tuple(Thing(nouns[i], colors[i], boxes[order.index(i)]) for i in range(len(nouns)))
    image = _background(rng)
    for thing in things:
        left, top, width, height = thing.box
        color, keep = _stamp(thing)
        region = image[top : top + height, left : left + width]
        region *= keep
        region += color
    return Scene(seed, theme, image.clip(0, 255).astype(np.uint8), things[:objects], things[objects:])


def patch_owner(shown: Scene, least: float = 0.15) -> np.ndarray:
    """Which thing each patch shows: int64 `[144]`, an index into `things`, or -1 for background.

    A patch counts as a thing's own when it covers at least `least` of it, and more of it than any other.
    """
    cover = np.zeros((len(shown.things) + 1, IMAGE_SIZE, IMAGE_SIZE), np.float32)
    for i, thing in enumerate(shown.things, 1):
        left, top, width, height = thing.box
        cover[i, top : top + height, left : left + width] = 1 - _stamp(thing)[1][..., 0]
    share = cover.reshape(len(cover), GRID, PATCH_SIZE, GRID, PATCH_SIZE).mean((2, 4))
    share[0] = least
    return share.argmax(0).reshape(-1) - 1
