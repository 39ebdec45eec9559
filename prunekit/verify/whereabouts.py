"""Whether visual tokens of a twin are where a guess of their coords says: what shows a patch changes most with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from prunekit.errors import Unsupported
from prunekit.families.base import Parts
from prunekit.families.grids import merge_of
from prunekit.verify.precision import Float64Throughout
from prunekit.verify.tiny_prompts import Recipe, encode, output_of, tensors_of

# Convolutions mix patches, so that a patch's own token may lose by chance; in a wrong order it wins by chance only.
TRIED, NEEDED = 12, 0.75


@torch.no_grad()
def coords_hold(model: Any, parts: Parts, recipe: Recipe) -> bool:
    """Whether coords of images are right on one that `recipe` draws; False also where they refuse it.

    model: a twin in float64, in whose tower no patch attends to others meanwhile. Where an image is a list of patches,
    those of a token stand together, or all row by row.
    """
    modality = parts.modalities[0]
    generator = torch.Generator().manual_seed(0)
    inputs = tensors_of(model, recipe, [recipe.image(model.config, generator)])
    pixels = inputs.get(modality.pixels)
    if pixels is None or getattr(output_of(model, "image", inputs)[1], "pooler_output", None) is None:
        return False
    with Float64Throughout(), _silenced(parts):
        before = _features(model, inputs)
        try:
            (coords,) = modality.coords(inputs, [len(before)])
        except (Unsupported, ValueError):
            return False
        tokens = torch.randperm(len(before), generator=generator)[:TRIED].tolist()
        return any(
            sum(_answers(model, inputs, modality.pixels, before, where, token) for token in tokens)
            >= NEEDED * len(tokens)
            for where in _layouts(coords, inputs, pixels, merge_of(model.config))
        )


@contextmanager
def _silenced(parts: Parts) -> Iterator[None]:
    """While open, attention outside of the decoder gives zeros."""

    def zeros(_: Any, args: Any, result: Any) -> Any:
        first = result[0] if isinstance(result, tuple) else result
        first = torch.zeros_like(first)
        return (first, *result[1:]) if isinstance(result, tuple) else first

    inside = {id(module) for module in parts.text.modules()}
    silent = [one for one in parts.base.modules() if type(one).__name__.endswith("Attention") and id(one) not in inside]
    handles = [module.register_forward_hook(zeros) for module in silent]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _features(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """Of the one image, (tokens, H)."""
    return torch.cat(list(encode(model, "image", inputs)))


def _layouts(coords: Tensor, inputs: Mapping[str, Tensor], pixels: Tensor, merge: int) -> Iterator[Tensor]:
    """For each token the pixels of its patches, bool (tokens, *pixels), by each way in which they may be laid out."""
    rows, columns = coords[0, 3:5].tolist()
    whole = torch.zeros(len(coords), rows, columns, dtype=torch.bool)
    whole[torch.arange(len(coords)), coords[:, 1], coords[:, 2]] = True
    if "image_grid_thw" in inputs or "spatial_shapes" in inputs:
        fine = whole.repeat_interleave(merge, 1).repeat_interleave(merge, 2).flatten(1)
        together = torch.arange(len(coords))[:, None] == torch.arange(fine.shape[1]) // merge**2
        lists = (fine,) if "spatial_shapes" in inputs else (together, fine)
        axis = 1 if "spatial_shapes" in inputs else 0
        for one in lists:
            shape = [1] * pixels.ndim
            shape[axis] = pixels.shape[axis]
            padded = torch.nn.functional.pad(one, (0, pixels.shape[axis] - one.shape[1]))
            yield padded.view(len(coords), *shape)
    else:
        height, width = pixels.shape[-2:]
        if not height % rows and not width % columns:
            fine = whole.repeat_interleave(height // rows, 1).repeat_interleave(width // columns, 2)
            yield fine.view(len(coords), *[1] * (pixels.ndim - 2), height, width)


def _answers(model: Any, inputs: Mapping[str, Tensor], name: str, before: Tensor, where: Tensor, token: int) -> bool:
    """Whether this token changes most, when its pixels are others."""
    pixels = inputs[name]
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(token)).to(pixels.dtype)
    after = _features(model, {**inputs, name: torch.where(where[token], pixels + 3 * noise, pixels)})
    return int((after - before).norm(dim=-1).argmax()) == token
