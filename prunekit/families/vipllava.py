"""ViP-LLaVA (https://arxiv.org/abs/2312.00784): LLaVA-1.5 whose projector reads several layers of the tower."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from prunekit.families.base import Family, Modality, Parts
from prunekit.families.decoders import decoder
from prunekit.families.grids import square_coords
from prunekit.families.towers import plain_tower


def _parts(model: PreTrainedModel) -> Parts:
    config: Any = model.config
    base: Any = model.model
    vision = config.vision_config
    return Parts(
        family="vipllava",
        base=base,
        modalities=(Modality("image", "get_image_features", "pixel_values", (config.image_token_id,), square_coords),),
        visual_tokens=(vision.image_size // vision.patch_size) ** 2,
        tower=plain_tower(base.vision_tower, None, config, strategy="default", merger=base.multi_modal_projector),
        **decoder(base.language_model),
    )


FAMILY = Family(name="vipllava", model_types=frozenset({"vipllava"}), parts=_parts)
