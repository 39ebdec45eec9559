"""Gemma 4 (https://ai.google.dev/gemma/docs/core/model_card_4): images and frames of any size in pooled patches.

In most sizes the last layers attend to the keys and values of earlier ones. The unified models have no tower: patches
are projected, each to one visual token.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from prunekit.families.base import Family, Modality, Parts
from prunekit.families.decoders import decoder
from prunekit.families.features import split_by
from prunekit.families.grids import places, positioned


def _parts(model: PreTrainedModel) -> Parts:
    config: Any = model.config
    base: Any = model.model
    unified = config.model_type == "gemma4_unified"
    cell = 1 if unified else config.vision_config.pooling_kernel_size
    image = "image_position_ids", cell
    video = "video_position_ids", cell, "num_frames_per_video"
    return Parts(
        family="gemma4",
        base=base,
        modalities=(
            Modality(
                "image", "get_image_features", "pixel_values", (config.image_token_id,), positioned(*image),
                split_by(places(*image)),
            ),
            Modality(
                "video", "get_video_features", "pixel_values_videos", (config.video_token_id,), positioned(*video),
                split_by(places(*video)),
            ),
        ),
        **decoder(base.language_model),
    )


FAMILY = Family(name="gemma4", model_types=frozenset({"gemma4", "gemma4_unified"}), parts=_parts)
