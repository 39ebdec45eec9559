"""Molmo 2 (https://allenai.org/blog/molmo2): the whole image, then one finer grid of its crops, pooled by attention.

Which patches a token pools comes with the pixels; crops overlap, and no patch is pooled twice. All image tokens of a
prompt see each other. Videos are refused: transformers takes no images and videos in one call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prunekit.families.base import Family, Modality, Parts
from prunekit.families.decoders import decoder
from prunekit.families.grids import checked, given, grid
from prunekit.families.tower_parts import Tower


def _parts(model: PreTrainedModel) -> Parts:
    config: Any = model.config
    base: Any = model.model
    chosen = config.adapter_config.vision_feature_layer
    layers = base.vision_tower.layers
    states = [(one + 1 if one >= 0 else one) % (len(layers) + 1) for one in chosen]
    return Parts(
        family="molmo2",
        base=base,
        modalities=(Modality("image", "get_image_features", "pixel_values", (config.image_token_id,), _coords),),
        tower=Tower(layers, None, feature_layer=max(states), patch_groups=_groups),
        **decoder(base.language_model),
    )


def _coords(arguments: Mapping[str, Any], counts: Sequence[int]) -> list[Tensor]:
    """The whole image as crop 0, the finer grid as crop 1."""
    shapes = torch.as_tensor(given(arguments, "image_grids")).tolist()
    return checked([torch.cat([grid(a, b), grid(c, d, crop=1)]) for a, b, c, d in shapes], counts)


def _groups(modality: str, arguments: Mapping[str, Any], rows: int, patches: int) -> list[Tensor]:
    """As the processor lists them, without rows that only fill up."""
    table = torch.as_tensor(arguments["image_token_pooling"]).cpu()
    shapes = torch.as_tensor(arguments["image_grids"]).tolist()
    return list(torch.split(table[(table >= 0).any(-1)], [a * b + c * d for a, b, c, d in shapes]))


FAMILY = Family(name="molmo2", model_types=frozenset({"molmo2"}), parts=_parts)
