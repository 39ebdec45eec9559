"""Qwen2-VL (https://arxiv.org/abs/2409.12191), Qwen2.5-VL (https://arxiv.org/abs/2502.13923), Qwen3-VL
(https://arxiv.org/abs/2511.21631) and Qwen3.5, with and without experts: images and videos of any size, positions of
three axes.

Patches are merged 2 x 2. Qwen3-VL adds features of the tower to the visual tokens after each of the first decoder
layers (DeepStack), and writes the time before each frame of a video. In Qwen3.5 three of four decoder layers are gated
delta nets (https://arxiv.org/abs/2412.06464), which hold a state in place of keys and values.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from prunekit.families.base import Family, Modality, Parts
from prunekit.families.decoders import decoder
from prunekit.families.grids import merged
from prunekit.families.towers import packed_tower


def _parts(model: PreTrainedModel) -> Parts:
    config: Any = model.config
    base: Any = model.model
    merge = config.vision_config.spatial_merge_size
    image, video = merged("image_grid_thw", merge), merged("video_grid_thw", merge)
    window = getattr(config.vision_config, "window_size", None)
    return Parts(
        family="qwen_vl",
        base=base,
        modalities=(
            Modality("image", "get_image_features", "pixel_values", (config.image_token_id,), image),
            Modality("video", "get_video_features", "pixel_values_videos", (config.video_token_id,), video),
        ),
        logical_until=len(getattr(config.vision_config, "deepstack_visual_indexes", ())),
        tower=packed_tower(base.visual, merge, window and window // merge // config.vision_config.patch_size),
        **decoder(base.language_model),
    )


TYPES = frozenset({"qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"})
FAMILY = Family(name="qwen_vl", model_types=TYPES, parts=_parts)
