"""Random images and videos for tiny models, as processors would hand them over.

One function a kind of input, from a config and a generator to the tensors of one image or video, whose first dimension
is concatenated over those of a batch. Sizes are drawn, so that the inputs of one batch differ where they may.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional

from prunekit import upstream
from prunekit.families.grids import merge_of

VisualInput = dict[str, Tensor]
Draw = Callable[[Any, Generator], VisualInput]
PIXELS = ("pixel_values", "pixel_values_videos")
# Tensors that number the patches of all images of a batch.
NUMBERS = ("image_token_pooling",)
# With this tensor patches of all images of a batch stand in one row.
IN_A_ROW = "target_sizes"
# What configs call the number of frames of a patch.
DEPTHS = ("temporal_patch_size", "patch_temporal")


def choose(generator: Generator, *choices: Any) -> Any:
    """One of `choices`."""
    return choices[int(torch.randint(len(choices), (1,), generator=generator))]


def square(config: Any, generator: Generator) -> VisualInput:
    """One image of the tower's own size: `pixel_values` (1, 3, side, side)."""
    side = side_of(config)
    return {"pixel_values": torch.randn(1, 3, side, side, generator=generator)}


def side_of(config: Any) -> int:
    """Pixels of a side of the images that the tower takes, wherever the config says it."""
    vision = getattr(config, "vision_config", config)
    parts = (vision, getattr(vision, "sam_config", None), config, getattr(config, "vq_config", None))
    for part, name in ((part, name) for part in parts for name in ("image_size", "resolution")):
        side = getattr(part, name, None)
        if side is not None:
            return int(side if isinstance(side, int) else side[0])
    return 224


def tiles(config: Any, generator: Generator) -> VisualInput:
    """An image cut into one to three tiles of the tower's size, each an image of its own to the model."""
    count = choose(generator, 1, 2, 3)
    return {"pixel_values": torch.cat([square(config, generator)["pixel_values"] for _ in range(count)])}


def masked_tiles(config: Any, generator: Generator) -> VisualInput:
    """As `tiles`, the last with padding at its right: also `pixel_attention_mask` (tiles, side, side).

    The padding is noise too: of patches that are all alike, rounding would decide which one a strategy keeps.
    """
    pixels = tiles(config, generator)["pixel_values"]
    mask = torch.ones(len(pixels), *pixels.shape[-2:], dtype=torch.int64)
    mask[-1, :, mask.shape[-1] * 3 // 5 :] = 0
    return {"pixel_values": pixels, "pixel_attention_mask": mask}


def any_size(config: Any, generator: Generator) -> VisualInput:
    """An image of its own size: `pixel_values` (1, 3, height, width), `image_sizes` (1, 2)."""
    cells = choose(generator, (2, 2), (2, 4), (4, 2), (3, 4), (4, 3), (1, 4))
    patch = getattr(getattr(config, "vision_config", None), "patch_size", 8)
    height, width = (patch * merge_of(config) * cell for cell in cells)
    pixels = torch.randn(1, 3, height, width, generator=generator)
    return {"pixel_values": pixels, "image_sizes": torch.tensor([[height, width]])}


def anyres(config: Any, generator: Generator) -> VisualInput:
    """An image of any size as the whole and as tiles: `pixel_values` (1, 1 + tiles, 3, side, side), `image_sizes`."""
    side = config.vision_config.image_size
    height, width = size = choose(generator, (56, 112), (100, 40), (50, 112), (112, 112), (90, 112), (30, 112))
    best = _best(size, config.image_grid_pinpoints)
    count = 1 + (best[0] // side) * (best[1] // side)
    return {
        "pixel_values": torch.randn(1, count, 3, side, side, generator=generator),
        "image_sizes": torch.tensor([[height, width]]),
    }


def _best(size: tuple[int, int], choices: list[list[int]]) -> list[int]:
    """The size among `choices` that keeps most of an image's pixels, then the one that wastes least."""

    def merit(choice: list[int]) -> tuple[int, int]:
        scale = min(choice[0] / size[0], choice[1] / size[1])
        kept = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        return kept, kept - choice[0] * choice[1]

    return max(choices, key=merit)


def frames(config: Any, generator: Generator) -> VisualInput:
    """A video of three frames of the tower's size: `pixel_values_videos` (1, 3, 3, side, side)."""
    side = side_of(config)
    return {"pixel_values_videos": torch.randn(1, 3, 3, side, side, generator=generator)}


def patches(config: Any, generator: Generator) -> VisualInput:
    """An image as a list of patches: `pixel_values` (h * w, channels * pixels), `image_grid_thw` (1, 3)."""
    cells = choose(generator, (2, 2), (2, 4), (4, 2), (2, 3), (3, 3), (4, 3))
    height, width = (merge_of(config) * cell for cell in cells)
    pixels = _patches(config, 1 * height * width, generator)
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, height, width]])}


def video_patches(config: Any, generator: Generator) -> VisualInput:
    """A video as a list of patches: `pixel_values_videos` (t * h * w, ...), `video_grid_thw` (1, 3)."""
    return _video(config, choose(generator, (2, 2, 2), (3, 2, 3), (2, 3, 2)), generator)


def even_video_patches(config: Any, generator: Generator) -> VisualInput:
    """As `video_patches`, of an even number of frames, for towers that merge two."""
    return _video(config, choose(generator, (2, 2, 2), (4, 2, 3), (2, 3, 2)), generator)


def _video(config: Any, cells: tuple[int, int, int], generator: Generator) -> VisualInput:
    time, (height, width) = cells[0], (merge_of(config) * cell for cell in cells[1:])
    pixels = _patches(config, time * height * width, generator)
    return {"pixel_values_videos": pixels, "video_grid_thw": torch.tensor([[time, height, width]])}


def _patches(config: Any, count: int, generator: Generator) -> Tensor:
    vision = config.vision_config
    depth = next((vars(vision)[name] for name in DEPTHS if isinstance(vars(vision).get(name), int)), 1)
    return torch.randn(count, 3 * depth * vision.patch_size**2, generator=generator)


# Rows of patches with their places are filled up to one length, as processors do: so many squares that become a token.
LONGEST = 9


def placed_patches(config: Any, generator: Generator) -> VisualInput:
    """An image as patches and their columns and rows: `pixel_values` (1, patches, ...), `image_position_ids`."""
    size = choose(generator, (2, 2), (2, 4), (4, 2), (2, 3), (3, 3), (1, 4))
    pixels, places = _placed(config, size, 1, generator)
    return {"pixel_values": pixels, "image_position_ids": places}


def placed_frames(config: Any, generator: Generator) -> VisualInput:
    """A video of such frames: `pixel_values_videos` (frames, ...), `video_position_ids`, `num_frames_per_video`; where
    the model takes videos of the same number of frames only, one entry of the first two.
    """
    stacked = upstream.stacks_videos()
    number, size = choose(generator, (2, (2, 2)), (2 if stacked else 3, (1, 2)), (2, (2, 1)))
    pixels, places = _placed(config, size, number, generator)
    if stacked:
        return {"pixel_values_videos": pixels[None], "video_position_ids": places[None]}
    return {"pixel_values_videos": pixels, "video_position_ids": places, "num_frames_per_video": torch.tensor([number])}


def _placed(config: Any, size: tuple[int, int], number: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Frames of so many rows and columns of visual tokens."""
    vision = config.vision_config
    side, merge = getattr(vision, "model_patch_size", vision.patch_size), getattr(vision, "pooling_kernel_size", 2)
    rows, columns = torch.meshgrid(*(torch.arange(merge * cells) for cells in size), indexing="ij")
    real = torch.stack([columns, rows], dim=-1).view(-1, 2)
    fill = LONGEST * merge**2 - len(real)
    places = functional.pad(real, (0, 0, 0, fill), value=-1).expand(number, -1, -1)
    pixels = torch.rand(number, len(real), 3 * side**2, generator=generator)
    return functional.pad(pixels, (0, 0, 0, fill)), places


def unfolded(one: Draw, depth: bool = False) -> Draw:
    """As `one`, each patch as a small image: (..., 3, side, side), or with its frames (..., 3, frames, side, side)."""

    def draw(config: Any, generator: Generator) -> VisualInput:
        side = config.vision_config.patch_size
        return {
            name: tensor.view(len(tensor), 3, *(-1,) * depth, side, side) if name in PIXELS else tensor
            for name, tensor in one(config, generator).items()
        }

    return draw


def with_merges(one: Draw, merge: int) -> Draw:
    """As `one`, with `image_merge_sizes` or `video_merge_sizes` (1,): patches of a row in one token."""

    def draw(config: Any, generator: Generator) -> VisualInput:
        drawn = one(config, generator)
        kind = "video" if "video_grid_thw" in drawn else "image"
        return drawn | {f"{kind}_merge_sizes": torch.tensor([merge])}

    return draw


def padded_patches(config: Any, generator: Generator) -> VisualInput:
    """An image as patches with padding: `pixel_values` (1, p, pixels), `spatial_shapes`, `pixel_attention_mask`."""
    cells = choose(generator, (2, 3), (3, 2), (2, 2), (3, 3))
    height, width = (merge_of(config) * cell for cell in cells)
    length = 9 * merge_of(config) ** 2
    shown = (torch.arange(length) < height * width)[None].long()
    pixels = torch.randn(1, length, 3 * config.vision_config.patch_size**2, generator=generator)
    return {
        "pixel_values": pixels,
        "spatial_shapes": torch.tensor([[height, width]]),
        "pixel_attention_mask": shown,
    }


def pooled(config: Any, generator: Generator) -> VisualInput:
    """An image as a whole and one crop, in patches of which 2 x 2 are pooled to a token.

    `pixel_values` (2, patches, pixels), `image_token_pooling` (tokens, 4), `image_grids` (1, 4).
    """
    vision = config.vision_config
    side = side_of(config) // vision.patch_size
    rows, columns = choose(generator, (side, side), (side, side - 2), (side - 2, side))
    square = torch.arange(side * side).view(side, side)
    crops = [square, side * side + square[:rows, :columns]]
    windows = [crop.unfold(0, 2, 2).unfold(1, 2, 2).reshape(-1, 4) for crop in crops]
    return {
        "pixel_values": torch.randn(2, side * side, 3 * vision.patch_size**2, generator=generator),
        "image_token_pooling": torch.cat(windows),
        "image_grids": torch.tensor([[side // 2, side // 2, rows // 2, columns // 2]]),
    }


def two_tiles(config: Any, generator: Generator) -> VisualInput:
    """An image in two tiles of the tower's size, one entry: `pixel_values` (1, 2, 3, side, side)."""
    return {"pixel_values": torch.cat([square(config, generator)["pixel_values"] for _ in range(2)])[None]}


def flat_patches(config: Any, generator: Generator) -> VisualInput:
    """An image of 16 patches that go into the decoder without a tower: `pixel_values` (1, 16, channels * pixels)."""
    return {"pixel_values": torch.randn(1, 16, 3 * config.patch_size**2, generator=generator)}


def flagged_tiles(config: Any, generator: Generator) -> VisualInput:
    """As `tiles`, with `pixel_attention_mask` (tiles,), which is true for tiles and false for what fills up a batch."""
    pixels = tiles(config, generator)["pixel_values"]
    return {"pixel_values": pixels, "pixel_attention_mask": torch.ones(len(pixels), dtype=torch.bool)}


def strips(config: Any, generator: Generator) -> VisualInput:
    """An image as one row of patches: `pixel_values` (1, 3, patch, patches * patch), `target_sizes` (1, 2)."""
    rows, columns = choose(generator, (4, 4), (4, 8), (8, 4))
    side = config.vision_config.patch_size
    pixels = torch.randn(1, 3, side, rows * columns * side, generator=generator)
    return {"pixel_values": pixels, IN_A_ROW: torch.tensor([[rows, columns]])}


def two_sizes(config: Any, generator: Generator) -> VisualInput:
    """An image in two resolutions: `pixel_values` and `high_res_pixel_values`, (1, 3, side, side) each."""
    side = config.high_res_vision_config.image_size
    return square(config, generator) | {"high_res_pixel_values": torch.randn(1, 3, side, side, generator=generator)}


def numbered(pieces: Sequence[Tensor], patches: Sequence[int]) -> list[Tensor]:
    """Tables of patches of single inputs, counted through those of all of them; patches: how many each input has."""
    starts = [0, *accumulate(patches)]
    return [torch.where(piece < 0, piece, piece + start) for piece, start in zip(pieces, starts, strict=False)]


def concatenate(pieces: list[Tensor]) -> Tensor:
    """Tensors one behind the other in their first dimension, the others filled up with zeros to the largest."""
    sizes = [max(piece.shape[n] for piece in pieces) for n in range(1, pieces[0].ndim)]

    def fill(piece: Tensor) -> Tensor:
        missing = [size - have for size, have in zip(sizes, piece.shape[1:], strict=True)]
        return functional.pad(piece, [edge for more in reversed(missing) for edge in (0, more)])

    return torch.cat([fill(piece) for piece in pieces])
