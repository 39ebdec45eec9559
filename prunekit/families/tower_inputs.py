"""What a vision tower gets of the images or videos of a prompt, from the arguments of its encoding method alone.

No pixel is read, so that arguments may be on the meta device, but for the sizes that say how many there are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from prunekit.cost import Area, TowerInput
from prunekit.families.base import Modality
from prunekit.families.tower_parts import Tower


def tower_input(tower: Tower, modality: Modality, arguments: Mapping[str, Any]) -> TowerInput | None:
    """Of all images or videos of one prompt together; None where the tower's sizes are not known.

    Raises Unsupported where visual tokens are not made of whole patches.
    """
    pixels = arguments[modality.pixels]
    if tower.packed:
        return _packed(tower, modality, arguments)
    if tower.tokens is None or pixels.ndim < 4:
        return None
    return _by_row(tower, modality, arguments, pixels.shape[:-3].numel(), tower.tokens)


def _packed(tower: Tower, modality: Modality, arguments: Mapping[str, Any]) -> TowerInput:
    """One sequence in which each image attends within its parts."""
    assert tower.patch_groups is not None
    tables = tower.patch_groups(modality.name, arguments, 0, 0)
    group = tables[0].shape[1]
    blocks = []
    for number in range(len(tower.layers)):
        parts: Sequence[Tensor] = [torch.zeros(len(table), dtype=torch.int64) for table in tables]
        if tower.parts is not None:
            parts = tower.parts(modality.name, arguments, number)
        blocks.append(_areas((count, 0) for part in parts for count in torch.bincount(part).tolist()))
    inputs = tuple((len(table), 0) for table in tables)
    apart = tower.images is not None and tower.images.apart
    return TowerInput(inputs, group, tuple(blocks), 0, sum(map(len, tables)) * group, apart=apart)


def _by_row(tower: Tower, modality: Modality, arguments: Mapping[str, Any], rows: int, tokens: int) -> TowerInput:
    """Each crop or frame is a row that attends to itself."""
    patches = tokens - tower.leading
    if tower.patch_groups is None:
        tables = list(torch.arange(rows * patches).view(rows, patches, 1))
    else:
        tables = tower.patch_groups(modality.name, arguments, rows, patches)
    group = tables[0].shape[1]
    first = torch.cat([table[:, 0] for table in tables])
    made = torch.bincount(first[first >= 0] // patches, minlength=rows).tolist()
    block = _areas((count, tokens - count * group) for count in made)
    inputs = tuple((len(table), int((table[:, 0] < 0).sum())) for table in tables)
    mapped = tower.mapped.get(modality.name, 0)
    return TowerInput(inputs, group, (block,) * len(tower.layers), rows, rows * tokens, mapped)


def _areas(counts: Any) -> tuple[Area, ...]:
    """From visual and fixed tokens of each area; equal ones are counted together."""
    return tuple(Area(visual, fixed, times) for (visual, fixed), times in sorted(Counter(counts).items()))
