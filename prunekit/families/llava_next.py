"""LLaVA-NeXT (https://llava-vl.github.io/blog/2024-01-30-llava-next/) and LLaVA-NeXT-Video.

An image is seen whole and in tiles; the joined tiles lose their padding and get a newline token at the end of each row.
Frames of a video are pooled.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from prunekit.families import patch_groups as packing
from prunekit.families.base import Family, Modality, Parts
from prunekit.families.decoders import decoder
from prunekit.families.grids import anyres, frames
from prunekit.families.towers import plain_tower


def _parts(model: PreTrainedModel) -> Parts:
    config: Any = model.config
    base: Any = model.model
    groups, pooled = packing.anyres(config), {}
    modalities = [Modality("image", "get_image_features", "pixel_values", (config.image_token_id,), anyres(config))]
    if config.model_type == "llava_next_video":
        side = config.vision_config.image_size // config.vision_config.patch_size // config.spatial_pool_stride
        pooled = {"video": side**2}  # frames come to the projector when they are pooled
        coords = frames("pixel_values_videos", side, newline=False)
        groups = packing.either(
            groups, packing.frames("pixel_values_videos", config.spatial_pool_stride, newline=False)
        )
        modalities.append(
            Modality("video", "get_video_features", "pixel_values_videos", (config.video_token_id,), coords)
        )
    tower = plain_tower(base.vision_tower, base.multi_modal_projector, config, groups)
    return Parts(
        family="llava_next",
        base=base,
        modalities=tuple(modalities),
        tower=None if tower is None else replace(tower, mapped={**tower.mapped, **pooled}),
        **decoder(base.language_model),
    )


FAMILY = Family(name="llava_next", model_types=frozenset({"llava_next", "llava_next_video"}), parts=_parts)
