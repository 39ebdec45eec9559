"""Gemma 3 (https://arxiv.org/abs/2503.19786): each image pooled to one square grid, whose tokens see each other.

Most layers see a window only. Crops of pan-and-scan count as images of their own.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from prunekit.families.base import Family, Modality, Parts
from prunekit.families.decoders import decoder
from prunekit.families.grids import square_coords
from prunekit.families.patch_groups import blocks
from prunekit.families.towers import plain_tower


def _parts(model: PreTrainedModel) -> Parts:
    config: Any = model.config
    base: Any = model.model
    side = config.vision_config.image_size // config.vision_config.patch_size
    merge = side // round(config.mm_tokens_per_image**0.5)
    return Parts(
        family="gemma3",
        base=base,
        modalities=(Modality("image", "get_image_features", "pixel_values", (config.image_token_id,), square_coords),),
        visual_tokens=config.mm_tokens_per_image,
        tower=plain_tower(base.vision_tower, None, config, blocks(merge), merger=base.multi_modal_projector),
        **decoder(base.language_model),
    )


FAMILY = Family(name="gemma3", model_types=frozenset({"gemma3"}), parts=_parts)
