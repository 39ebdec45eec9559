"""Where visual tokens are in their images and videos, against the pixels that a token really depends on.

With the attention of the tower silenced, a visual token depends on a few patches of one crop, and on nothing else. Its
gradient shows which, whatever the model does between tower and decoder: dropping CLS, shuffling, pooling, unpadding.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from prunekit.families import find
from prunekit.families.base import Modality
from prunekit.testing.tiny_configs import PATCH
from prunekit.testing.tiny_families import encode, takes_video, tiny_batch, tiny_model

OUTPUT = re.compile(r".*(out_proj|o_proj|projection_layer)\.(weight|bias)")
# Tokens of these are merged from patches in the order of the three axes, which their positions repeat.
PATCHED = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "glm4v", "glm46v", "glm4v_moe")
SQUARE = (
    "llava", "vipllava", "internvl", "gemma3", "paligemma", "idefics3", "smolvlm", "mistral3", "aya_vision",
    "cohere2_vision", "ovis2", "perception_lm",
)  # fmt: skip
ANYRES = ("llava_next", "llava_next_video", "llava_onevision")


def local_model(family: str) -> Any:
    """A tiny model in whose tower no patch sees another."""
    model = tiny_model(family)
    for name, weight in model.named_parameters():
        if "language_model" not in name and "text_model" not in name and OUTPUT.fullmatch(name):
            weight.zero_()
    return model


def modality(model: Any, kind: str) -> Modality:
    return next(one for one in find(model).modalities if one.name == kind)


def touched(model: Any, kind: str, inputs: dict[str, Tensor]) -> list[list[Tensor]]:
    """For each picture and visual token, the patches that it depends on: bool (crops of the batch, rows, columns)."""
    pixels = inputs[modality(model, kind).pixels].clone().requires_grad_(True)
    given = inputs | {modality(model, kind).pixels: pixels}
    pictures = encode(model, kind, given)
    return [[_patches(token, pixels) for token in picture] for picture in pictures]


def _patches(token: Tensor, pixels: Tensor) -> Tensor:
    (slope,) = torch.autograd.grad(token.sum(), pixels, retain_graph=True, allow_unused=True)
    slope = torch.zeros_like(pixels) if slope is None else slope
    crops = slope.abs().sum(-3).flatten(0, -3)
    return torch.nn.functional.max_pool2d(crops[:, None], PATCH)[:, 0] > 0


def places(model: Any, kind: str, inputs: dict[str, Tensor], counts: list[int]) -> list[Tensor]:
    return modality(model, kind).coords(inputs, counts)


def check(found: Tensor, seen: list[Tensor], first: int) -> None:
    """One picture: `found` int64 (n, 5) against what each token depends on; `first`: its first crop in the batch."""
    assert len(found) == len(seen)
    spans: dict[int, list[tuple[int, Tensor, Tensor]]] = {}
    for number, (place, patches) in enumerate(zip(found.tolist(), seen, strict=True)):
        crop, row, column = place[:3]
        if row < 0:
            assert column == -1 and not patches.any(), f"token {number} separates, but shows something"
            continue
        crops, rows, columns = (axis.unique() for axis in patches.nonzero(as_tuple=True))
        assert crops.tolist() == [first + crop], f"token {number} is in crop {crops - first}, not {crop}"
        spans.setdefault(crop, []).append((number, rows, columns))
    for tokens in spans.values():
        for axis in (0, 1):
            lines = [token[1 + axis] for token in tokens]
            low, high = int(torch.cat(lines).min()), int(torch.cat(lines).max())
            length = int(found[tokens[0][0], 3 + axis])
            cell = (high + 1 - low) / length
            for (number, *_), line in zip(tokens, lines, strict=True):
                start = low + int(found[number, 1 + axis]) * cell
                assert [int(line.min()), int(line.max()) + 1] == [start, start + cell], f"token {number}, axis {axis}"
                assert found[number, 3 + axis] == length


@pytest.mark.parametrize("family", SQUARE)
def test_tokens_show_what_their_place_says(family: str) -> None:
    model = local_model(family)
    inputs = tiny_batch(model, [("image",), ("image", "image")])
    seen = touched(model, "image", inputs)
    found = places(model, "image", inputs, list(map(len, seen)))
    empty = len(inputs["pixel_values"].flatten(0, -4)) // len(seen) if family in ("idefics3", "smolvlm") else 1
    for number, (place, patches) in enumerate(zip(found, seen, strict=True)):
        check(place, patches, number * empty)


@pytest.mark.parametrize("family", ANYRES)
@pytest.mark.parametrize("seed", range(4))
def test_tiles_unpadded_and_joined(family: str, seed: int) -> None:
    model = local_model(family)
    inputs = tiny_batch(model, [("image",), ("image",), ("image",)], seed=seed)
    seen = touched(model, "image", inputs)
    found = places(model, "image", inputs, list(map(len, seen)))
    tiles = inputs["pixel_values"].shape[1]
    for number, (place, patches) in enumerate(zip(found, seen, strict=True)):
        check(place, patches, number * tiles)
        newlines = place[place[:, 1] < 0]
        assert len(newlines) == (place[:, 0] > 0).sum() - (place[:, 1] >= 0)[place[:, 0] > 0].sum() > 0
        assert int(place[:, 0].max()) > 0


def test_several_images_of_a_prompt_are_not_cut_into_tiles() -> None:
    model = local_model("llava_onevision")
    inputs = tiny_batch(model, [("image", "image"), ("image",)])
    seen = touched(model, "image", inputs)
    found = places(model, "image", inputs, list(map(len, seen)))
    for number, (place, patches) in enumerate(zip(found, seen, strict=True)):
        check(place, patches, number * inputs["pixel_values"].shape[1])
    assert [int(place[:, 0].max()) for place in found[:2]] == [0, 0]
    assert found[0][-1].tolist() == [0, -1, -1, 4, 4]


def test_a_large_image_is_shrunken_after_its_tiles_were_joined() -> None:
    model = local_model("llava_onevision")
    side = model.config.vision_config.image_size
    inputs = {
        "pixel_values": torch.randn(1, 10, 3, side, side, dtype=model.dtype),
        "image_sizes": torch.tensor([[160, 168]]),
    }
    (seen,) = touched(model, "image", inputs)
    (found,) = places(model, "image", inputs, [len(seen)])
    assert len(found) == 16 + 8 * (8 + 1)
    for place, patches in zip(found.tolist(), seen, strict=True):
        if place[1] >= 0:
            assert place[0] in patches.nonzero()[:, 0].tolist()
    tiles = found[16:]
    for crop in range(1, 10):
        inside = tiles[(tiles[:, 0] == crop) & (tiles[:, 1] >= 0)]
        rows, columns = inside[0, 3:5].tolist()
        assert inside[:, 1:3].tolist() == [[row, column] for row in range(rows) for column in range(columns)]


@pytest.mark.parametrize("family", [name for name in ANYRES if takes_video(name)])
def test_frames_of_a_video(family: str) -> None:
    model = local_model(family)
    inputs = tiny_batch(model, [("video",), ("video", "video")])
    seen = touched(model, "video", inputs)
    found = places(model, "video", inputs, list(map(len, seen)))
    for number, (place, patches) in enumerate(zip(found, seen, strict=True)):
        check(place, patches, number * 3)
        assert place[:, 0].unique().tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("family", "kind"), [(name, kind) for name in PATCHED for kind in ("image", "video")] + [("paddleocr_vl", "image")]
)
def test_merged_patches_stand_where_their_positions_say(family: str, kind: str) -> None:
    model = tiny_model(family)
    inputs = tiny_batch(model, [(kind,), (kind, kind)])
    counts = [len(picture) for picture in encode(model, kind, inputs)]
    found = places(model, kind, inputs, counts)
    known = {"input_ids", "attention_mask", "mm_token_type_ids", "image_grid_thw", "video_grid_thw"}
    positions, _ = model.model.get_rope_index(**{name: tensor for name, tensor in inputs.items() if name in known})
    visual = inputs["mm_token_type_ids"] > 0
    expected = positions[:, visual].T.split(counts)
    for place, position in zip(found, expected, strict=True):
        for frame in place[:, 0].unique():
            inside = place[:, 0] == frame
            grid = position[inside][:, 1:] - position[inside][:, 1:].amin(0)
            assert torch.equal(place[inside][:, 1:3], grid)
            assert torch.equal(place[inside][0, 3:], grid.amax(0) + 1)
        assert place[:, 0].tolist() == sorted(place[:, 0].tolist())
        time = position[:, 0]
        assert all(time[n] < time[n + 1] for n in range(len(time) - 1) if place[n, 0] < place[n + 1, 0])


@pytest.mark.parametrize("family", ["gemma4", "gemma4_unified"])
@pytest.mark.parametrize("kind", ["image", "video"])
def test_patches_that_come_with_their_places(family: str, kind: str) -> None:
    """Each token depends on the patches of its cell, whose columns and rows stand beside the pixels."""
    model = tiny_model(family)
    for name, weight in model.named_parameters():
        if "vision" in name and "o_proj" in name:
            weight.zero_()
    inputs = tiny_batch(model, [(kind,), (kind, kind)])
    cell = 1 if family == "gemma4_unified" else model.config.vision_config.pooling_kernel_size
    pixels = inputs[modality(model, kind).pixels].clone().requires_grad_(True)
    shown = encode(model, kind, inputs | {modality(model, kind).pixels: pixels})
    found = places(model, kind, inputs, list(map(len, shown)))
    positions, first = inputs[f"{kind}_position_ids"], 0
    for place, tokens in zip(found, shown, strict=True):
        for (frame, row, column, rows, columns), token in zip(place.tolist(), tokens, strict=True):
            (slope,) = torch.autograd.grad(token.sum(), pixels, retain_graph=True)
            frames, patches = (slope.abs().sum(-1) > 0).nonzero(as_tuple=True)
            assert frames.unique().tolist() == [first + frame]
            assert {(y // cell, x // cell) for x, y in positions[first + frame, patches].tolist()} == {(row, column)}
            assert len(patches) == cell**2 and row < rows and column < columns
        first += int(place[:, 0].max()) + 1


@pytest.mark.parametrize("family", ANYRES)
def test_tiles_form_one_grid(family: str) -> None:
    """Behind the whole image, tokens stand row by row in the grid of their places, and tiles fill it side by side."""
    model = tiny_model(family)
    for seed in range(6):
        batch = tiny_batch(model, [("image",)], seed=seed)
        counts = [len(one) for one in encode(model, "image", dict(batch))]
        for table in modality(model, "image").coords(dict(batch), counts):
            if table.shape[1] == 5:
                continue
            side = int(table[0, 3])
            assert torch.equal(table[: side * side, 5:], table[: side * side, 1:5])
            tiles = table[side * side :]
            shown = tiles[tiles[:, 1] >= 0]
            rows, columns = shown[0, 7:].tolist()
            assert [(y, x) for y, x in shown[:, 5:7].tolist()] == [(y, x) for y in range(rows) for x in range(columns)]
            assert (tiles[tiles[:, 1] < 0][:, 5:7] == -1).all()
            begins = shown[:, 5:7] - shown[:, 1:3]  # of the tile that each token is of
            for tile in shown[:, 0].unique():
                assert len(begins[shown[:, 0] == tile].unique(dim=0)) == 1


def test_a_map_is_one_square_grid() -> None:
    """FastVLM: what a token shows lies around the middle of its cell, as convolutions overlap."""
    model = tiny_model("fast_vlm")
    inputs = tiny_batch(model, [("image",), ("image",)])
    found = places(model, "image", inputs, [16, 16])
    for one in find(model).modalities[0].coords({}, [16, 16]):
        assert torch.equal(one, found[0])
    assert found[0][:, 1:3].tolist() == [[row, column] for row in range(4) for column in range(4)]


def test_crops_and_the_whole_image_stand_where_their_patches_do() -> None:
    """Molmo 2, by the patches that each token pools; the tiny crop is the image again, cut at two edges."""
    model = tiny_model("molmo2")
    inputs = tiny_batch(model, [("image",), ("image", "image")])
    counts = [len(one) for one in encode(model, "image", inputs)]
    found = torch.cat(places(model, "image", inputs, counts))
    first = inputs["image_token_pooling"][:, 0]
    side = 6
    crop, inside = first // side**2, first % side**2
    expected = torch.stack([crop % 2, inside // side // 2, inside % side // 2], 1)
    assert torch.equal(found[:, :3], expected)
    for number in crop.unique():
        assert torch.equal(found[crop == number][0, 3:], found[crop == number][:, 1:3].amax(0) + 1)
