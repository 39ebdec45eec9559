"""GLM-4.1V (https://arxiv.org/abs/2507.01006), GLM-4.5V and GLM-4.6V, with and without experts.

Images and videos of any size, positions of three axes, patches merged 2 x 2. Frames of a video stand behind the id of
images, so that one batch holds either images or videos; transformers refuses both.
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
    ids = (config.image_token_id,)
    return Parts(
        family="glm4v",
        base=base,
        modalities=(
            Modality("image", "get_image_features", "pixel_values", ids, merged("image_grid_thw", merge)),
            Modality("video", "get_video_features", "pixel_values_videos", ids, merged("video_grid_thw", merge)),
        ),
        tower=packed_tower(base.visual, merge),
        **decoder(base.language_model),
    )


FAMILY = Family(name="glm4v", model_types=frozenset({"glm4v", "glm4v_moe", "glm46v"}), parts=_parts)
