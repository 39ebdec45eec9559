"""Which part of which image a crop shows, read off real image processors; the expected boxes are worked out by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
import transformers
from PIL import Image

from prunekit.families.images import in_patches, padded
from prunekit.records import VisualTokens
from prunekit.trace.boxes import WHOLE, Box
from prunekit.trace.exhibits import exhibits_of
from prunekit.trace.surfaces import LOST, placed
from prunekit.trace.windows import windows_of

TF: Any = transformers
SIDE = {"height": 56, "width": 56}
HALVES = [(0, 0, 0.5, 1), (0.5, 0, 1, 1)]
THIRDS = [(0, 0, 1, 1 / 3), (0, 1 / 3, 1, 2 / 3), (0, 2 / 3, 1, 1)]
ALL = [(0, 0, 1, 1)]
TILES = TF.GotOcr2ImageProcessorPil(size=SIDE, crop_to_patches=True, min_patches=1, max_patches=6)
CENTRE = TF.CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size=SIDE)
SPLIT = TF.Idefics3ImageProcessorPil(size={"longest_edge": 112}, max_image_size={"longest_edge": 56})


def found(processor: Any, sizes: Sequence[tuple[int, int]], crops: Sequence[int], holder: Any = None) -> Any:
    windows = windows_of(sizes, crops, lambda images: processor(images, return_tensors="pt"), holder)
    return windows and [(one.picture, one.box.left, one.box.top, one.box.right, one.box.bottom) for one in windows]


def expected(*images: Sequence[tuple[float, ...]]) -> Any:
    rows = [(number, *box) for number, boxes in enumerate(images) for box in boxes]
    return [pytest.approx(row, abs=0.01) for row in rows]


class TestProcessors:
    def test_the_middle_is_cut_out(self) -> None:
        """640 x 480 becomes 74 x 56, of which 9 columns go on either side."""
        wide, tall = (9 / 74, 0, 65 / 74, 1), (0, 0.25, 1, 0.75)
        assert found(CENTRE, [(640, 480), (100, 200)], [1, 1]) == expected([wide], [tall])

    def test_squashed_and_padded(self) -> None:
        assert found(TF.SiglipImageProcessorPil(size=SIDE), [(640, 480)], [1]) == expected(ALL)
        square = TF.LlavaImageProcessorPil(size={"shortest_edge": 56}, crop_size=SIDE, do_pad=True)
        assert found(square, [(640, 480)], [1]) == expected([(0, -1 / 6, 1, 7 / 6)])

    @pytest.mark.parametrize("crops", [[3, 4], [1] * 7], ids=["images", "tiles"])
    def test_tiles_that_are_entries_of_their_own_or_not(self, crops: list[int]) -> None:
        assert found(TILES, [(640, 320), (100, 300)], crops) == expected(HALVES + ALL, THIRDS + ALL)

    def test_images_of_a_row_in_one_entry(self) -> None:
        quarters = [(x, y, x + 0.5, y + 0.5) for y in (0, 0.5) for x in (0, 0.5)]
        assert found(SPLIT, [(640, 320), (200, 200)], [8]) == expected(HALVES + ALL, quarters + ALL)

    def test_packed_ones(self) -> None:
        qwen = TF.Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=56 * 112 * 8)
        holder = in_patches({"image": "image_grid_thw"}, 2, 14, 2, 3)
        assert found(qwen, [(640, 320), (100, 300)], [1, 1], holder) == expected(ALL, ALL)
        pixtral = TF.PixtralImageProcessorPil(patch_size=14, size={"longest_edge": 140})
        assert found(pixtral, [(640, 320)], [1], padded(14, 1)) == expected(ALL)

    def test_what_cannot_be_told_is_not_guessed(self) -> None:
        assert found(CENTRE, [(640, 480)], [2]) is None
        refuses: dict[str, Any] = {}
        assert windows_of([(640, 480)], [1], lambda images: refuses, None) is None

        def noise(images: list[Any]) -> Mapping[str, Any]:
            return {"pixel_values": torch.rand(len(images), 3, 56, 56)}

        assert windows_of([(640, 480)], [1], noise, None) is None

        def flat(images: list[Any]) -> Mapping[str, Any]:
            return {"pixel_values": torch.zeros(len(images), 3, 56, 56)}

        assert windows_of([(640, 480)], [1], flat, None) is None


def entry(first: int, crops: int, joined: bool = False) -> VisualTokens:
    """An entry of crops of 2 x 2 tokens, counted from `first`."""
    coords = tuple(
        (crop, row, column, 2, 2, row, column, 2, 2) for crop in range(crops) for row in (0, 1) for column in (0, 1)
    )
    return VisualTokens("image", tuple(range(first, first + 4 * crops)), coords, joined)


class TestExhibits:
    IMAGES = (Image.new("RGB", (640, 320)), Image.new("RGB", (100, 300)))

    def test_tiles_come_to_their_images(self) -> None:
        entries = [entry(4 * number, 1) for number in range(7)]
        one, other = exhibits_of(entries, self.IMAGES, lambda images: TILES(images, return_tensors="pt"))
        assert one.tokens.ordinals == tuple(range(12)) and other.tokens.ordinals == tuple(range(12, 28))
        assert [place[0] for place in one.tokens.coords or ()] == [0] * 4 + [1] * 4 + [2] * 4
        shown = placed(one, 0, "image 1")
        assert [surface.title for surface in shown.surfaces] == ["image 1, tiles", "image 1, whole"]
        boxes = {cell.token: cell.box for cell in shown.surfaces[0].cells}
        assert boxes[0].scaled(640, 320) == pytest.approx((0, 0, 160, 160), abs=2)
        assert boxes[7].scaled(640, 320) == pytest.approx((480, 160, 640, 320), abs=2)
        assert [cell.token for cell in shown.surfaces[1].cells] == [8, 9, 10, 11]

    def test_one_entry_is_taken_apart(self) -> None:
        images = (self.IMAGES[0], Image.new("RGB", (200, 200)))
        one, other = exhibits_of([entry(0, 8)], images, lambda shown: SPLIT(shown, return_tensors="pt"))
        assert one.tokens.ordinals == tuple(range(12)) and other.tokens.ordinals == tuple(range(12, 32))
        assert [place[0] for place in other.tokens.coords or ()][::4] == [0, 1, 2, 3, 4]

    def test_without_a_processor_crops_are_not_put_on_images(self) -> None:
        (one,) = exhibits_of([entry(0, 2)], self.IMAGES[:1])
        shown = placed(one, 0, "image")
        assert shown.note == LOST and not shown.on_image
        assert [surface.picture for surface in shown.surfaces] == [None, None]
        assert [surface.title for surface in shown.surfaces] == ["image, crop 0", "image, crop 1"]

    def test_a_family_that_says_where_tiles_stand(self) -> None:
        """The whole in 2 x 2, then a tile in the left half of a grid of 2 x 4."""
        rows = [(0, y, x, 2, 2, y, x, 2, 2) for y in (0, 1) for x in (0, 1)]
        rows += [(1, y, x, 2, 2, y, x, 2, 4) for y in (0, 1) for x in (0, 1)] + [(1, -1, -1, 2, 2, -1, -1, 2, 4)]
        (one,) = exhibits_of([VisualTokens("image", tuple(range(9)), tuple(rows), True)], self.IMAGES[:1])
        shown = placed(one, 0, "image")
        whole, tiles = shown.surfaces
        assert whole.cells[3].box == Box(0.5, 0.5, 1, 1) and tiles.cells[3].box == Box(0.25, 0.5, 0.5, 1)
        assert shown.separators == (8,)

    def test_unknown_places_are_drawn_in_order_and_say_so(self) -> None:
        tokens = VisualTokens("image", (0, 1, 2, 3, 4), None, unknown="5 visual tokens do not fill a square grid")
        shown = placed(exhibits_of([tokens], self.IMAGES[:1])[0], 0, "image")
        assert shown.note.startswith("5 visual tokens") and not shown.on_image
        assert shown.surfaces[0].picture is None and len(shown.surfaces[0].cells) == 5

    def test_frames_lie_on_their_frames(self) -> None:
        video = VisualTokens("video", tuple(range(8)), entry(0, 2).coords)
        frames = [Image.new("RGB", (40, 30), colour) for colour in ("red", "green", "blue", "white")]
        (one,) = exhibits_of([video], [frames])
        shown = placed(one, 0, "video")
        assert [surface.picture for surface in shown.surfaces] == [frames[0], frames[2]]
        assert shown.surfaces[1].cells[0].token == 4 and shown.surfaces[1].cells[3].box == Box(0.5, 0.5, 1, 1)

    def test_boxes(self) -> None:
        assert WHOLE.part(1, 2, 2, 4) == Box(0.5, 0.5, 0.75, 1)
        assert WHOLE.overlaps(Box(0.9, 0.9, 2, 2)) and not Box(0, 0, 0.5, 1).overlaps(Box(0.5, 0, 1, 1))
