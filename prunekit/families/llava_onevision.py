"""LLaVA-OneVision (https://arxiv.org/abs/2408.03326): one image in tiles, several whole, frames of a video pooled.

Large images are shrunken after the tiles have been joined; each row of tokens, a single image and a video end with a
newline token.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from prunekit.families import patch_groups as packing
from prunekit.families.base import Family, Modality, Parts
from prunekit.families.decoders import decoder
from prunekit.families.features import each, ending_with
from prunekit.families.grids import anyres, frames
from prunekit.families.towers import plain_tower
from prunekit.upstream import newline_later


def _parts(model: PreTrainedModel) -> Parts:
    config: Any = model.config
    base: Any = model.model
    side = config.vision_config.image_size // config.vision_config.patch_size
    video = frames("pixel_values_videos", -(-side // 2), newline=True)
    images = anyres(config, limited=True)
    groups = packing.either(
        packing.anyres(config, limited=True), packing.frames("pixel_values_videos", 2, newline=True)
    )
    features = ending_with(base.image_newline) if newline_later(base) else each
    return Parts(
        family="llava_onevision",
        base=base,
        modalities=(
            Modality("image", "get_image_features", "pixel_values", (config.image_token_id,), images),
            Modality("video", "get_video_features", "pixel_values_videos", (config.video_token_id,), video, features),
        ),
        tower=plain_tower(base.vision_tower, base.multi_modal_projector, config, groups),
        **decoder(base.language_model),
    )


FAMILY = Family(name="llava_onevision", model_types=frozenset({"llava_onevision"}), parts=_parts)
