"""Where visual tokens are in their images and videos, by the packings that families share; see `Modality.coords`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.models.llava_next import modeling_llava_next

from prunekit.errors import Unsupported

PACKING: Any = modeling_llava_next  # its functions are not typed
# What configs call the number of patches of a row that become one visual token.
MERGES = ("spatial_merge_size", "merge_size", "merge_kernel_size", "downsample_factor")
Coords = Callable[[Mapping[str, Any], Sequence[int]], list[Tensor]]


def grid(rows: int, columns: int, crop: int = 0) -> Tensor:
    """Coords, int64 (rows * columns, 5), of one complete grid, row by row."""
    return grid_coords(torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).view(-1, 2), crop)


def separator(rows: int, columns: int, crop: int) -> Tensor:
    """The coords, int64 (1, 5), of a token of that crop which shows nothing."""
    return torch.tensor([[crop, -1, -1, rows, columns]])


def checked(coords: list[Tensor], counts: Sequence[int]) -> list[Tensor]:
    """`coords` if they fit the visual tokens of each image or video. Raises Unsupported if they do not."""
    if list(map(len, coords)) != list(counts):
        raise Unsupported(
            f"coords of the visual tokens cannot be told: {list(map(len, coords))} tokens an image or video expected, "
            f"the encoder made {list(counts)}; strategies that ask for `coords` or `frames` cannot run on them"
        )
    return coords


def merged(sizes: str, merge: int) -> Coords:
    """Images and videos of any size in patches of which `merge` x `merge` become one token.

    sizes: the argument with frames, rows and columns of patches of each image or video, int64 (inputs, 3).
    """

    def coords(arguments: Mapping[str, Any], counts: Sequence[int]) -> list[Tensor]:
        shapes = torch.as_tensor(given(arguments, sizes)).tolist()
        return checked([_grids(shape, merge) for shape in shapes], counts)

    return coords


def pixels(cell: int) -> Coords:
    """Images of the sizes in `image_sizes`, in pixels, of which `cell` x `cell` become one token."""

    def coords(arguments: Mapping[str, Any], counts: Sequence[int]) -> list[Tensor]:
        sizes = torch.as_tensor(given(arguments, "image_sizes")).tolist()
        return checked([grid(height // cell, width // cell) for height, width in sizes], counts)

    return coords


def by_arguments(kind: str, config: Any) -> Coords:
    """Images or videos (`kind`) of a model without a family file, by what its encoder was given beside their pixels.

    That is their grid in patches, their size in pixels, or nothing, where tokens fill a square. Which of the tokens is
    where is a guess, as `prunekit.verify.proof` tests it. Raises Unsupported where their numbers do not fit.
    """

    def coords(arguments: Mapping[str, Any], counts: Sequence[int]) -> list[Tensor]:
        merge = merge_of(config)
        there = {name for name, value in arguments.items() if value is not None}
        if f"{kind}_grid_thw" in there:
            merges = torch.as_tensor(arguments.get(f"{kind}_merge_sizes", [merge])).tolist()
            shapes = torch.as_tensor(arguments[f"{kind}_grid_thw"]).tolist()
            each = merges * len(shapes) if len(merges) == 1 else merges
            return checked([_grids(shape, by) for shape, by in zip(shapes, each, strict=True)], counts)
        if "spatial_shapes" in there:
            shapes = torch.as_tensor(arguments["spatial_shapes"]).tolist()
            return checked([grid(rows // merge, columns // merge) for rows, columns in shapes], counts)
        if "image_sizes" in there and hasattr(config, "vision_config"):
            return pixels(config.vision_config.patch_size * merge)(arguments, counts)
        if kind == "video":
            raise Unsupported(
                "where visual tokens are in the frames of a video is not known of a model without a family file; "
                "strategies that ask for `coords` or `frames` cannot run on them"
            )
        return square_coords(arguments, counts)

    return coords


def _grids(shape: Sequence[int], merge: int) -> Tensor:
    frames, rows, columns = shape
    return torch.cat([grid(rows // merge, columns // merge, frame) for frame in range(frames)])


def merge_of(config: Any) -> int:
    """How many patches of a row become one visual token, as the configs of a model say; 2 where none does."""
    parts = (getattr(config, "vision_config", config), config)
    for part, name in ((part, name) for name in MERGES for part in parts):
        merge = getattr(part, name, None)
        merge = merge[0] if isinstance(merge, (list, tuple)) else merge
        if isinstance(merge, int):
            return merge
    return 2


def stacked(side: int) -> Coords:
    """Images of any number of square crops of `side` x `side` tokens, one behind the other."""

    def coords(arguments: Mapping[str, Any], counts: Sequence[int]) -> list[Tensor]:
        each = side * side
        tables = [[grid(side, side, crop) for crop in range(count // each)] for count in counts]
        return checked([torch.cat([torch.empty(0, 5, dtype=torch.int64), *crops]) for crops in tables], counts)

    return coords


def frames(argument: str, side: int, newline: bool) -> Coords:
    """Videos (videos, frames, ...) whose frames are each pooled to `side` x `side` tokens.

    newline: whether one token that shows nothing stands behind the last frame.
    """

    def coords(arguments: Mapping[str, Any], counts: Sequence[int]) -> list[Tensor]:
        number = given(arguments, argument).shape[1]
        shown = torch.cat([grid(side, side, frame) for frame in range(number)])
        whole = torch.cat([shown, separator(side, side, number - 1)]) if newline else shown
        return checked([whole] * len(counts), counts)

    return coords


def anyres(config: Any, limited: bool = False) -> Coords:
    """The whole image as crop 0, then its tiles 1, 2 ... joined row by row, unpadded, with newlines.

    Tiles at an edge that is unpadded have fewer rows or columns; the newline of a row of tokens belongs to the last
    tile of that row. Images without tiles end with one newline. limited: large images are shrunken, as in
    LLaVA-OneVision; a token then belongs to the tile in which its centre lies.
    """
    side = config.vision_config.image_size // config.vision_config.patch_size

    def coords(arguments: Mapping[str, Any], counts: Sequence[int]) -> list[Tensor]:
        limit = _limit(arguments, config) if limited else None
        sizes = torch.as_tensor(given(arguments, "image_sizes")).tolist()
        tables = [
            torch.cat([grid(side, side), separator(side, side, 0)])
            if count == side * side + 1
            else torch.cat([_whole(grid(side, side)), _tiles(size, side, limit, config)])
            for size, count in zip(sizes, counts, strict=True)
        ]
        return checked(tables, counts)

    return coords


def _whole(coords: Tensor) -> Tensor:
    """Coords, int64 (n, 5), of a crop that shows the whole image, with its places: int64 (n, 9)."""
    return torch.cat([coords, coords[:, 1:]], dim=1)


def positioned(positions: str, cell: int, frames: str | None = None) -> Coords:
    """Images and frames as rows of patches with their places, as `places` has them."""
    tables = places(positions, cell, frames)
    return lambda arguments, counts: checked(tables(arguments), counts)


def places(positions: str, cell: int, frames: str | None = None) -> Callable[[Mapping[str, Any]], list[Tensor]]:
    """Coords from the arguments alone, where patches have their places, of which `cell` x `cell` become one token.

    positions: the argument with column and row of each patch, int64 (images or frames, patches, 2), -1 on padding; or
        (videos, frames, patches, 2), as before transformers 5.21.
    frames: the argument with the number of frames of each video, where they are not stacked; None: rows are images.
    """

    def coords(arguments: Mapping[str, Any]) -> list[Tensor]:
        table = torch.as_tensor(given(arguments, positions))
        last = table.flatten(0, -3).amax(1)
        sizes = [((row + 1) // cell, (column + 1) // cell) for column, row in last.tolist()]
        if table.ndim > 3:
            many = [table.shape[1]] * len(table)
        else:
            many = [1] * len(sizes) if frames is None else torch.as_tensor(given(arguments, frames)).tolist()
        rest = iter(sizes)
        return [torch.cat([grid(*next(rest), frame) for frame in range(number)]) for number in many]

    return coords


def _tiles(size: Sequence[int], side: int, limit: int | None, config: Any) -> Tensor:
    """Coords of an image's tokens behind the whole, int64 (n, 9): rows with a newline each."""
    down, across = PACKING.get_anyres_image_grid_shape(
        size, config.image_grid_pinpoints, config.vision_config.image_size
    )
    rows, columns = torch.meshgrid(torch.arange(down * side), torch.arange(across * side), indexing="ij")
    cut = PACKING.unpad_image(torch.stack([rows, columns]), size)
    tile_rows, tile_columns = cut[0, :, 0] // side, cut[1, 0] // side
    if limit is not None:
        ratio = (cut[0].numel() / (limit * side**2)) ** 0.5
        if ratio > 1.1:
            tile_rows, tile_columns = (_shrunken(line, int(len(line) // ratio)) for line in (tile_rows, tile_columns))
    row, height = _within(tile_rows)
    column, width = _within(tile_columns)
    crop = 1 + tile_rows[:, None] * across + tile_columns
    shape = crop.shape
    down_all, across_all = torch.arange(shape[0])[:, None], torch.arange(shape[1])
    parts = [crop, row[:, None], column, height[:, None], width, down_all, across_all, *map(torch.tensor, shape)]
    table = torch.stack([part.expand(shape) for part in parts], dim=-1)
    newline = table[:, -1:].clone()
    newline[..., [1, 2, 5, 6]] = -1
    return torch.cat([table, newline], dim=1).view(-1, 9)


def _shrunken(tiles: Tensor, length: int) -> Tensor:
    """The tile of each of `length` tokens that evenly cover a line of tokens with the tiles `tiles`."""
    centres = (torch.arange(length) + 0.5) * len(tiles) / length
    return tiles[centres.long()]


def _within(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """For each token on a line its number within its tile, and how many the tile has: int64 (tokens,) each."""
    same = functional.one_hot(tiles).bool()
    counts = same.sum(0)
    return (same.cumsum(0)[same] - 1), counts[tiles]


def _limit(arguments: Mapping[str, Any], config: Any) -> int:
    return int((arguments.get("vision_aspect_ratio") or config.vision_aspect_ratio).removeprefix("anyres_max_"))


def given(arguments: Mapping[str, Any], name: str) -> Any:
    if arguments.get(name) is None:
        raise Unsupported(f"coords of the visual tokens cannot be told, as '{name}' did not come with the pixels")
    return arguments[name]


def square_grid(tokens: int) -> Tensor:
    """Row and column, int64 (tokens, 2), of visual tokens that fill a square image row by row.

    Raises Unsupported if `tokens` is no square number, as when a CLS token is among them.
    """
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise Unsupported(
            f"{tokens} visual tokens do not fill a square grid, so a strategy that asks for `coords` cannot run on them"
        )
    return torch.cartesian_prod(torch.arange(side), torch.arange(side)).view(-1, 2)


def square_coords(arguments: Mapping[str, Any], counts: Sequence[int]) -> list[Tensor]:
    """Coords of images that each fill one square grid; as `Modality.coords`."""
    return [grid_coords(square_grid(count)) for count in counts]


def grid_coords(grid: Tensor, crop: int = 0) -> Tensor:
    """Coords, int64 (n, 5), of one complete grid from rows and columns, int64 (n, 2)."""
    size = grid.amax(0) + 1
    return torch.cat([grid.new_full((len(grid), 1), crop), grid, size.expand(len(grid), 2)], dim=1)
