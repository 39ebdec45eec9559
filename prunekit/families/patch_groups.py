"""Which patches of a vision tower become which visual token, as families pack them; see `Tower.patch_groups`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from prunekit.errors import Unsupported
from prunekit.families.features import shown_tiles
from prunekit.families.grids import PACKING

PatchGroups = Callable[[str, Mapping[str, Any], int, int], list[Tensor]]


def selected(leading: int, strategy: str) -> PatchGroups:
    """One patch each, row by row. "default" drops the first token, whatever it is; "full" hands all of them on."""

    def groups(modality: str, arguments: Mapping[str, Any], rows: int, patches: int) -> list[Tensor]:
        wanted = arguments.get("vision_feature_select_strategy") or strategy
        one = torch.arange((1 if wanted == "default" else 0) - leading, patches)
        return [torch.where(one < 0, -1, one + row * patches)[:, None] for row in range(rows)]

    return groups


def blocks(merge: int) -> PatchGroups:
    """Square images of which `merge` x `merge` patches become one token, one row of the tower each."""

    def groups(modality: str, arguments: Mapping[str, Any], rows: int, patches: int) -> list[Tensor]:
        one = square(patches, merge)
        return [one + row * patches for row in range(rows)]

    return groups


def square(patches: int, merge: int) -> Tensor:
    """Patches of each token of one square image, int64 (tokens, merge * merge)."""
    side = round(patches**0.5)
    if side * side != patches or side % merge:
        raise Unsupported(f"visual tokens are not made of whole patches: {patches} patches, {merge} x {merge} a token")
    return cells(side, side, merge)


def cells(rows: int, columns: int, merge: int) -> Tensor:
    """Patches of each token of an image of so many rows and columns of patches, int64 (tokens, merge * merge)."""
    grid = torch.arange(rows * columns).view(rows // merge, merge, columns // merge, merge)
    return grid.transpose(1, 2).reshape(-1, merge * merge)


def anyres(config: Any, limited: bool = False) -> PatchGroups:
    """The whole image, then its tiles joined and unpadded, with a newline behind each row; or whole with a newline.

    limited: images above a limit are shrunken by interpolation, which is refused.
    """
    grid_of, size_of = PACKING.get_anyres_image_grid_shape, config.vision_config.image_size

    def groups(modality: str, arguments: Mapping[str, Any], rows: int, patches: int) -> list[Tensor]:
        side, first, tables = round(patches**0.5), 0, []
        images = arguments.get("batch_num_images") if limited else None
        lone = None if images is None else [n == 1 for n in torch.as_tensor(images).tolist() for _ in range(n)]
        for number, size in enumerate(torch.as_tensor(arguments["image_sizes"]).tolist()):
            whole = torch.arange(patches) + first * patches
            tiled = lone is None or lone[number]
            down, across = grid_of(size, config.image_grid_pinpoints, size_of) if tiled else (0, 0)
            first += 1 + down * across
            if not tiled:
                tables.append(torch.cat([whole, whole.new_tensor([-1])])[:, None])
                continue
            tiles = torch.arange(down * across * patches).view(down, across, side, side) + whole[-1] + 1
            shown = PACKING.unpad_image(tiles.transpose(1, 2).reshape(1, down * side, across * side), size)[0]
            if limited:
                _check_limit(shown, side, arguments, config)
            lines = torch.nn.functional.pad(shown, (0, 1), value=-1)
            tables.append(torch.cat([whole, lines.flatten()])[:, None])
        return tables

    return groups


def _check_limit(shown: Tensor, side: int, arguments: Mapping[str, Any], config: Any) -> None:
    limit = int((arguments.get("vision_aspect_ratio") or config.vision_aspect_ratio).removeprefix("anyres_max_"))
    if (shown.numel() / (limit * side**2)) ** 0.5 > 1.1:
        raise Unsupported(
            f"an image of {shown.shape[0]} x {shown.shape[1]} patches is shrunken by interpolation, so that its "
            "visual tokens are not made of whole patches; use smaller images, or stages that neither cut nor read "
            "the tower"
        )


def frames(argument: str, merge: int, newline: bool) -> PatchGroups:
    """Videos (videos, frames, ...) of frames pooled by `merge`; newline: one token behind the last frame."""

    def groups(modality: str, arguments: Mapping[str, Any], rows: int, patches: int) -> list[Tensor]:
        videos, number = arguments[argument].shape[:2]
        one = square(patches, merge)
        behind = one.new_full((int(newline), one.shape[1]), -1)
        all_of = [[one + (video * number + frame) * patches for frame in range(number)] for video in range(videos)]
        return [torch.cat([*shown, behind]) for shown in all_of]

    return groups


def stacked(merge: int) -> PatchGroups:
    """Square crops of each prompt one behind the other; empty ones, all zeros, are not encoded."""

    def groups(modality: str, arguments: Mapping[str, Any], rows: int, patches: int) -> list[Tensor]:
        one, first, tables = square(patches, merge), 0, []
        for count in shown_tiles(arguments["pixel_values"]).sum(1).tolist():
            crops = [one + row * patches for row in range(first, first + count)]
            tables.append(torch.cat([one[:0], *crops]))
            first += count
        return tables

    return groups


def merged(sizes: Mapping[str, str], merge: int, window: int | None = None) -> PatchGroups:
    """Images and videos of any size as one sequence in which the patches of a token stand together.

    sizes: for each modality the argument with frames, rows and columns of patches of each image or video.
    window: how many tokens wide the windows are by which the tower sorts its tokens; None: it does not.
    """

    def groups(modality: str, arguments: Mapping[str, Any], rows: int, patches: int) -> list[Tensor]:
        order, counts = [], []
        for number, (shown, down, across) in enumerate(torch.as_tensor(arguments[sizes[modality]]).tolist()):
            shape = (shown, down // merge, across // merge)
            tokens_of = torch.cartesian_prod(*map(torch.arange, shape)).view(-1, 3)
            line = [(number, f, r // (window or 1), c // (window or 1), r, c) for f, r, c in tokens_of.tolist()]
            order += line if window else []
            counts.append(len(tokens_of))
        total = sum(counts)
        where = torch.arange(total)
        if window:
            where[torch.tensor(sorted(range(total), key=order.__getitem__))] = torch.arange(total)
        each = torch.arange(merge * merge)
        return list(torch.split(where[:, None] * len(each) + each, counts))

    return groups


def parts(
    sizes: Mapping[str, str], merge: int, window: int | None, full: Sequence[int]
) -> Callable[[str, Mapping[str, Any], int], list[Tensor]]:
    """As `Tower.parts`, for towers that attend frame by frame, with windows outside of the blocks `full`.

    sizes, merge, window: as for `merged`.
    """

    def numbers(modality: str, arguments: Mapping[str, Any], block: int) -> list[Tensor]:
        side = None if block in full else window
        tables = []
        for shown, down, across in torch.as_tensor(arguments[sizes[modality]]).tolist():
            places = torch.cartesian_prod(*map(torch.arange, (shown, down // merge, across // merge))).view(-1, 3)
            places[:, 1:] = places[:, 1:] // side if side else 0
            tables.append(torch.unique(places, dim=0, return_inverse=True)[1])
        return tables

    return numbers


def by_rows(sizes: str, merge: int) -> PatchGroups:
    """Images of any size as one sequence, each row by row; `merge` x `merge` patches are one token.

    sizes: the argument with frames, rows and columns of patches of each image.
    """

    def groups(modality: str, arguments: Mapping[str, Any], rows: int, patches: int) -> list[Tensor]:
        tables, first = [], 0
        for frames, down, across in torch.as_tensor(arguments[sizes]).tolist():
            one = cells(down, across, merge)
            tables.append(torch.cat([one + first + frame * down * across for frame in range(frames)]))
            first += frames * down * across
        return tables

    return groups


def by_size(patch: int, merge: int) -> PatchGroups:
    """Images of the sizes in `image_sizes`, in pixels, as one sequence of patches row by row."""

    def groups(modality: str, arguments: Mapping[str, Any], rows: int, patches: int) -> list[Tensor]:
        tables, first = [], 0
        for height, width in torch.as_tensor(arguments["image_sizes"]).tolist():
            down, across = height // patch, width // patch
            if down % merge or across % merge:
                raise Unsupported(f"visual tokens of an image of {down} x {across} patches are not made of whole ones")
            tables.append(cells(down, across, merge) + first)
            first += down * across
        return tables

    return groups


def either(image: PatchGroups, video: PatchGroups) -> PatchGroups:
    """Images and videos, each by their own rule."""

    def groups(modality: str, arguments: Mapping[str, Any], rows: int, patches: int) -> list[Tensor]:
        return (video if modality == "video" else image)(modality, arguments, rows, patches)

    return groups
