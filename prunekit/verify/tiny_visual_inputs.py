"""Random images and videos for tiny models, as processors would hand them over.

One function a kind of input, from a config and a generator to the tensors of one image or video, whose first dimension
is concatenated over those of a batch. Sizes are drawn, so that the inputs of one batch differ where they may.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional

from prunekit import upstream

VisualInput = dict[str, Tensor]
Draw = Callable[[Any, Generator], VisualInput]


def choose(generator: Generator, *choices: Any) -> Any:
    """One of `choices`."""
    return choices[int(torch.randint(len(choices), (1,), generator=generator))]


def square(config: Any, generator: Generator) -> VisualInput:
    """One image of the tower's own size: `pixel_values` (1, 3, side, side)."""
    side = config.vision_config.image_size
    side = side if isinstance(side, int) else side[0]
    return {"pixel_values": torch.randn(1, 3, side, side, generator=generator)}


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
    height, width = choose(generator, (56, 56), (56, 112), (112, 56), (84, 112), (112, 84), (28, 112))
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
    side = config.vision_config.image_size
    return {"pixel_values_videos": torch.randn(1, 3, 3, side, side, generator=generator)}


def patches(config: Any, generator: Generator) -> VisualInput:
    """An image as a list of patches: `pixel_values` (h * w, channels * pixels), `image_grid_thw` (1, 3)."""
    height, width = choose(generator, (4, 4), (4, 8), (8, 4), (4, 6), (6, 6), (8, 6))
    pixels = _patches(config, 1 * height * width, generator)
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, height, width]])}


def video_patches(config: Any, generator: Generator) -> VisualInput:
    """A video as a list of patches: `pixel_values_videos` (t * h * w, ...), `video_grid_thw` (1, 3)."""
    time, height, width = choose(generator, (2, 4, 4), (3, 4, 6), (2, 6, 4))
    pixels = _patches(config, time * height * width, generator)
    return {"pixel_values_videos": pixels, "video_grid_thw": torch.tensor([[time, height, width]])}


def _patches(config: Any, count: int, generator: Generator) -> Tensor:
    vision = config.vision_config
    depth = getattr(vision, "temporal_patch_size", 1)
    return torch.randn(count, 3 * depth * vision.patch_size**2, generator=generator)


# Rows of patches with their places are filled up to one length, as processors do.
LONGEST = 36


def placed_patches(config: Any, generator: Generator) -> VisualInput:
    """An image as patches and their columns and rows: `pixel_values` (1, patches, ...), `image_position_ids`."""
    size = choose(generator, (4, 4), (4, 8), (8, 4), (4, 6), (6, 6), (2, 8))
    pixels, places = _placed(config, size, 1, generator)
    return {"pixel_values": pixels, "image_position_ids": places}


def placed_frames(config: Any, generator: Generator) -> VisualInput:
    """A video of such frames: `pixel_values_videos` (frames, ...), `video_position_ids`, `num_frames_per_video`; where
    the model takes videos of the same number of frames only, one entry of the first two.
    """
    stacked = upstream.stacks_videos()
    number, size = choose(generator, (2, (4, 4)), (2 if stacked else 3, (2, 4)), (2, (4, 2)))
    pixels, places = _placed(config, size, number, generator)
    if stacked:
        return {"pixel_values_videos": pixels[None], "video_position_ids": places[None]}
    return {"pixel_values_videos": pixels, "video_position_ids": places, "num_frames_per_video": torch.tensor([number])}


def _placed(config: Any, size: tuple[int, int], number: int, generator: Generator) -> tuple[Tensor, Tensor]:
    vision = config.vision_config
    side = getattr(vision, "model_patch_size", vision.patch_size)
    rows, columns = torch.meshgrid(*map(torch.arange, size), indexing="ij")
    real = torch.stack([columns, rows], dim=-1).view(-1, 2)
    places = functional.pad(real, (0, 0, 0, LONGEST - len(real)), value=-1).expand(number, -1, -1)
    pixels = torch.rand(number, len(real), 3 * side**2, generator=generator)
    return functional.pad(pixels, (0, 0, 0, LONGEST - len(real))), places


def concatenate(pieces: list[Tensor]) -> Tensor:
    """Tensors one behind the other in their first dimension, the others filled up with zeros to the largest."""
    sizes = [max(piece.shape[n] for piece in pieces) for n in range(1, pieces[0].ndim)]

    def fill(piece: Tensor) -> Tensor:
        missing = [size - have for size, have in zip(sizes, piece.shape[1:], strict=True)]
        return functional.pad(piece, [edge for more in reversed(missing) for edge in (0, more)])

    return torch.cat([fill(piece) for piece in pieces])
