"""How the arguments of an encoding method hold images and videos, for what happens to them before the tower.

An image or video of any size is one tensor, float (frames, F, C, H, W): F frames that the tower takes together, C
colours. Images that all have one size stay as the model takes them, (..., H, W).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prunekit.errors import Unsupported


@dataclass(frozen=True)
class Images:
    """How a tower's images lie in the arguments of an encoding method.

    unpack: from the name of the modality and the arguments to a tensor for each image or video. Raises Unsupported for
    arguments that do not hold them.
    pack: the same arguments with other such tensors in their place.
    cell: side, in pixels, of the square that becomes one visual token, and merge, the patches on that side; None where
    the tower takes images of one size only. apart: pixels lie patch by patch, so that what leaves is not embedded.
    """

    unpack: Callable[[str, Mapping[str, Any]], list[Tensor]]
    pack: Callable[[str, Mapping[str, Any], Sequence[Tensor]], dict[str, Any]]
    cell: int | None = None
    merge: int = 1
    apart: bool = False


PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}


def whole() -> Images:
    """Images of one size, one entry each, which may be a stack of crops or frames."""

    def unpack(modality: str, arguments: Mapping[str, Any]) -> list[Tensor]:
        return list(_given(arguments, PIXELS[modality]))

    def pack(modality: str, arguments: Mapping[str, Any], images: Sequence[Tensor]) -> dict[str, Any]:
        given = arguments[PIXELS[modality]]
        return {**arguments, PIXELS[modality]: torch.stack(list(images)) if isinstance(given, Tensor) else list(images)}

    return Images(unpack, pack)


def in_patches(sizes: Mapping[str, str], merge: int, patch: int, frames: int, colours: int) -> Images:
    """Images and videos of any size as one sequence of patches, those of a visual token together, (patches, values):
    each patch is `colours` x `frames` x `patch` x `patch`.

    sizes: for each modality the argument with frames, rows and columns of patches of each image or video.
    """
    values = colours * frames * patch * patch

    def unpack(modality: str, arguments: Mapping[str, Any]) -> list[Tensor]:
        shapes = torch.as_tensor(_given(arguments, sizes[modality])).tolist()
        pixels = _given(arguments, PIXELS[modality])
        counts = [shown * down * across for shown, down, across in shapes]
        if pixels.shape != (sum(counts), values):
            raise Unsupported(
                f"{PIXELS[modality]} is {tuple(pixels.shape)}, but {sizes[modality]} and the model's config say "
                f"{(sum(counts), values)}; give the processor's whole output"
            )
        return [image(part, *shape) for part, shape in zip(torch.split(pixels, counts), shapes, strict=True)]

    def image(part: Tensor, shown: int, down: int, across: int) -> Tensor:
        cells = part.view(shown, down // merge, across // merge, merge, merge, colours, frames, patch, patch)
        return cells.permute(0, 6, 5, 1, 3, 7, 2, 4, 8).reshape(shown, frames, colours, down * patch, across * patch)

    def rows(shown: Tensor) -> Tensor:
        down, across = (side // (merge * patch) for side in shown.shape[-2:])
        cells = shown.reshape(len(shown), frames, colours, down, merge, patch, across, merge, patch)
        return cells.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, values)

    def pack(modality: str, arguments: Mapping[str, Any], images: Sequence[Tensor]) -> dict[str, Any]:
        grids = [[len(one), one.shape[-2] // patch, one.shape[-1] // patch] for one in images]
        before = torch.as_tensor(arguments[sizes[modality]])
        told = torch.tensor(grids, dtype=before.dtype, device=before.device)
        return {**arguments, PIXELS[modality]: torch.cat(list(map(rows, images))), sizes[modality]: told}

    return Images(unpack, pack, merge * patch, merge, apart=True)


def padded(patch: int, merge: int) -> Images:
    """Images of the sizes in `image_sizes`, each in the upper left corner of an entry (C, H, W) of one tensor."""
    cell = patch * merge

    def unpack(modality: str, arguments: Mapping[str, Any]) -> list[Tensor]:
        sizes = torch.as_tensor(_given(arguments, "image_sizes")).tolist()
        pixels = _given(arguments, PIXELS[modality])
        return [
            one[None, None, :, : height // cell * cell, : width // cell * cell]
            for one, (height, width) in zip(pixels, sizes, strict=True)
        ]

    def pack(modality: str, arguments: Mapping[str, Any], images: Sequence[Tensor]) -> dict[str, Any]:
        height, width = (max(one.shape[axis] for one in images) for axis in (-2, -1))
        pixels = [
            torch.nn.functional.pad(one[0, 0], (0, width - one.shape[-1], 0, height - one.shape[-2])) for one in images
        ]
        before = torch.as_tensor(arguments["image_sizes"])
        sizes = torch.tensor([one.shape[-2:] for one in images], dtype=before.dtype, device=before.device)
        return {**arguments, PIXELS[modality]: torch.stack(pixels), "image_sizes": sizes}

    return Images(unpack, pack, cell, merge)


def cells(image: Tensor, cell: int) -> Tensor:
    """The squares of `cell` x `cell` pixels of float (frames, F, C, H, W), row by row: (squares, F, C, cell, cell)."""
    shown, frames, colours, height, width = image.shape
    parts = image.view(shown, frames, colours, height // cell, cell, width // cell, cell)
    return parts.permute(0, 3, 5, 1, 2, 4, 6).reshape(-1, frames, colours, cell, cell)


def _given(arguments: Mapping[str, Any], name: str) -> Any:
    if arguments.get(name) is None:
        raise Unsupported(f"'{name}' did not come with the call, so images cannot be changed before the vision tower")
    return arguments[name]
