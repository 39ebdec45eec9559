"""PixelPrune and EVS by their published rules: figures that need no weights, and rules written again the slow way."""

from __future__ import annotations

import inspect

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import prunekit
from prunekit import hookspecs
from prunekit.errors import SpecError

SIDE = 24


def stage_of(name: str, **options: object):
    return prunekit.load({"name": name, "stages": [{"use": name, **options}]}).stages[0]


def places(frames: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Coords (V, 5) and frames (V,) of a complete grid."""
    grid = torch.cartesian_prod(torch.arange(frames), torch.arange(rows), torch.arange(columns)).view(-1, 3)
    size = torch.tensor([rows, columns]).expand(len(grid), 2)
    return torch.cat([torch.zeros(len(grid), 1, dtype=torch.int64), grid[:, 1:], size], 1), grid[:, 0]


def kept(stage, patches: Tensor, coords: Tensor, frames: Tensor) -> list[int]:
    """The numbers of the squares that stay. patches: (V, F, C, Y, X), normalised."""
    names = [name for name in inspect.signature(hookspecs.TokenHooks.select_tokens).parameters if name != "self"]
    given_ = {"patches": patches, "coords": coords, "frames": frames}
    keep = stage.hook.select_tokens(**{name: given_.get(name) for name in names})
    assert keep.dtype == torch.bool and keep.shape == (len(patches),)
    return keep.nonzero()[:, 0].tolist()


def flat(values: Tensor) -> Tensor:
    """Squares of 2 x 2 pixels and three colours, all of one value in [0, 1], twice, as Qwen3-VL's processor gives them:
    (V, 2, 3, 2, 2).
    """
    return ((values.flatten() - 0.5) / 0.5)[:, None, None, None, None].expand(-1, 2, 3, 2, 2).clone()


def drawing(name: str) -> Tensor:
    """Values of the squares of an image, (24, 24)."""
    image = torch.zeros(SIDE, SIDE)
    if name == "left and right":
        image[:, 12:] = 1
    elif name == "top and bottom":
        image[12:] = 1
    elif name == "one odd square":
        image[5, 7] = 1
    elif name == "a square of 6 x 6":
        image[8:14, 8:14] = 1
    elif name == "checkerboard":
        image = (torch.arange(SIDE)[:, None] + torch.arange(SIDE)) % 2 * 1.0
    elif name == "all distinct":
        image = torch.arange(SIDE * SIDE).view(SIDE, SIDE) / SIDE**2
    elif name == "vertical stripes":
        image[:, ::2] = 1
    elif name == "horizontal stripes":
        image[::2] = 1
    return image


class TestPixelPrune:
    @pytest.mark.parametrize("anchored", [True, False])
    @pytest.mark.parametrize(("name", "where"), [
        ("constant", [(0, 0)]), ("left and right", [(0, 0), (0, 12)]), ("top and bottom", [(0, 0), (12, 0)]),
        ("one odd square", [(0, 0), (5, 7), (5, 8), (6, 7)]),
        ("a square of 6 x 6", [(0, 0), (8, 8), (8, 14), (14, 8)]),
        ("checkerboard", 576), ("all distinct", 576), ("vertical stripes", 24), ("horizontal stripes", 24),
    ])  # fmt: skip
    def test_exact_duplicates(self, name, where, anchored):
        found = kept(stage_of("pixelprune", anchored=anchored), flat(drawing(name)), *places(1, SIDE, SIDE))
        if isinstance(where, int):
            assert len(found) == where
        else:
            assert found == [row * SIDE + column for row, column in where]

    def test_small_steps_add_up_only_where_nothing_is_anchored(self):
        steps = flat(torch.arange(SIDE) / 100)
        coords = places(1, 1, SIDE)
        assert kept(stage_of("pixelprune", tau=0.055), steps, *coords) == [0, 6, 12, 18]
        assert kept(stage_of("pixelprune", tau=0.055, anchored=False), steps, *coords) == [0]

    def test_tau_is_in_the_units_of_the_image(self):
        """Of pixels between 0 and 1, whatever they were divided by."""
        for std in (0.5, 0.27):
            squares = torch.tensor([0.2, 0.3])[:, None, None, None, None].expand(-1, 2, 3, 2, 2) / std
            for tau, many in ((0.09, 2), (0.11, 1)):
                stage = stage_of("pixelprune", tau=tau, std=std, anchored=False)
                assert len(kept(stage, squares, *places(1, 1, 2))) == many

    def test_distances(self):
        """One of twelve values is off by 1.2: the largest difference, the mean, the root of the mean square."""
        squares = flat(torch.zeros(2))
        squares[1, 0, 0, 0, 0] += 1.2 / 0.5
        for distance, apart in (("max", 1.2), ("mae", 0.1), ("rmse", 1.2 / 12**0.5)):
            for tau, many in ((apart - 0.01, 2), (apart + 0.01, 1)):
                stage = stage_of("pixelprune", tau=tau, distance=distance)
                assert len(kept(stage, squares, *places(1, 1, 2))) == many, (distance, tau)

    def test_the_second_frame_of_a_still_image_is_not_looked_at(self):
        squares = flat(torch.zeros(2))
        squares[1, 1] = 7
        assert kept(stage_of("pixelprune"), squares, *places(1, 1, 2)) == [0]

    def test_videos_pass(self):
        assert len(kept(stage_of("pixelprune"), flat(torch.zeros(2, 3, 3)), *places(2, 3, 3))) == 18

    @given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 999), st.sampled_from((0.0, 0.3)), st.booleans(),
           st.booleans())  # fmt: skip
    def test_the_rule_one_square_after_another(self, rows, columns, seed, tau, anchored, holes):
        """Also where an earlier stage has left holes, from which nothing is predicted."""
        generator = torch.Generator().manual_seed(seed)
        values = torch.randint(4, (rows, columns), generator=generator) / 4
        there = torch.rand(rows, columns, generator=generator) > 0.3 * holes
        there[0, 0] = True
        coords, frames = (table[there.flatten()] for table in places(1, rows, columns))
        stage = stage_of("pixelprune", tau=tau, anchored=anchored)
        found = kept(stage, flat(values[there]), coords, frames)
        grid = [[float(values[r, c]) if there[r, c] else None for c in range(columns)] for r in range(rows)]
        stay = slow(grid, tau, anchored)
        order = [(r, c) for r in range(rows) for c in range(columns) if there[r, c]]
        assert [order[number] for number in found] == [place for place in order if place in stay]

    @pytest.mark.parametrize(
        ("options", "said"), [({"tau": -0.1}, "tau"), ({"std": 0}, "std"), ({"keep": 0.5}, "keep")]
    )
    def test_options_that_are_none(self, options, said):
        with pytest.raises(SpecError, match=said):
            stage_of("pixelprune", **options)


def slow(grid: list[list[float | None]], tau: float, anchored: bool) -> set[tuple[int, int]]:
    """Where squares stay, by the rule as it is told."""
    seen, stay = [list(row) for row in grid], set()

    def near(one: float | None, other: float | None) -> bool:
        return one is not None and other is not None and abs(one - other) <= tau

    for r, row in enumerate(grid):
        for c, own in enumerate(row):
            left = seen[r][c - 1] if c else None
            above = seen[r - 1][c] if r else None
            corner = seen[r - 1][c - 1] if r and c else None
            guess = above if left is None else left
            if near(corner, left) and not near(corner, above):
                guess = above
            if own is None:
                continue
            if not near(own, guess):
                stay.add((r, c))
            elif anchored:
                seen[r][c] = guess
    return stay


class TestEvs:
    @pytest.mark.parametrize(("each", "frames", "rate", "left"), [
        (256, 8, 0.75, 512), (256, 8, 0.9, 256), (256, 8, 0.5, 1024), (256, 1, 0.9, 256), (196, 32, 0.9, 627),
        (196, 32, 0.7, 1881), (256, 128, 0.7, 9830), (10, 20, 0.9, 19), (10, 20, 0.8, 39), (64, 8, 0.0, 512),
    ])  # fmt: skip
    def test_how_many_stay(self, each, frames, rate, left):
        """(10, 20) round twice: 200 * (1 - 0.9) is 19.99..., of which 19 are left."""
        squares = torch.rand(each * frames, 1, 1, 1, 1, generator=torch.Generator().manual_seed(each))
        assert len(kept(stage_of("evs", rate=rate), squares, *places(frames, each, 1))) == left

    def test_of_equal_changes_the_earlier_stays(self):
        found = kept(stage_of("evs", rate=0.75), flat(torch.zeros(8, 8, 8)), *places(8, 8, 8))
        assert found == list(range(128))  # the first frame and all of the second

    def test_a_change_and_the_way_back(self):
        clip = torch.zeros(8, 4, 4)
        clip[5, 1:3] = 1
        found = kept(stage_of("evs", rate=0.75), flat(clip), *places(8, 4, 4))
        assert found == [*range(16), *(5 * 16 + n for n in range(4, 12)), *(6 * 16 + n for n in range(4, 12))]

    def test_both_frames_that_are_taken_together_count(self):
        squares = flat(torch.zeros(3, 2, 1))
        squares[4, 1] = 3  # the later frame of the third pair, in its first row
        assert kept(stage_of("evs", rate=0.5), squares, *places(3, 2, 1)) == [0, 1, 4]

    def test_what_has_nothing_before_it_is_kept_first(self):
        """An earlier stage took the second frame: the third has no neighbour."""
        clip = torch.zeros(4, 1, 4)
        clip[3] = 1
        coords, frames = places(4, 1, 4)
        there = frames != 1
        found = kept(stage_of("evs", rate=0.33), flat(clip)[there], coords[there], frames[there])
        assert found == list(range(8))

    @given(
        st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.sampled_from((0.0, 0.3, 0.75)), st.integers(0, 99)
    )
    def test_the_rule_one_square_after_another(self, frames, rows, columns, rate, seed):
        squares = torch.randint(3, (frames * rows * columns, 2, 1, 2, 2), generator=torch.Generator().manual_seed(seed))
        found = kept(stage_of("evs", rate=rate), squares.double(), *places(frames, rows, columns))
        each = rows * columns
        changes = [
            255.0 if n < each else sum(map(abs, (squares[n] - squares[n - each]).flatten().tolist()))
            for n in range(len(squares))
        ]
        order = sorted(range(len(squares)), key=lambda n: (-changes[n], n))
        assert found == sorted(order[: max(each, int(len(squares) * (1 - rate)))])

    @pytest.mark.parametrize("rate", [1.0, -0.1])
    def test_rates_that_are_none(self, rate):
        with pytest.raises(SpecError, match="rate"):
            stage_of("evs", rate=rate)


@pytest.mark.parametrize("scale", [0, 1.01, -1])
def test_scales_that_are_none(scale):
    with pytest.raises(SpecError, match="scale"):
        stage_of("downsample", scale=scale)
