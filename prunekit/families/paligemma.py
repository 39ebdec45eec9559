"""PaliGemma 1 and 2 (https://arxiv.org/abs/2407.07726, https://arxiv.org/abs/2412.03555).

SigLIP tower, Gemma decoder; all tokens of the prompt see each other.
"""

from __future__ import annotations

from dataclasses import replace
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
    tower = plain_tower(base.vision_tower, base.multi_modal_projector, config)
    inside = getattr(base.vision_tower, "vision_model", base.vision_tower)
    return Parts(
        family="paligemma",
        base=base,
        modalities=(Modality("image", "get_image_features", "pixel_values", (config.image_token_id,), square_coords),),
        visual_tokens=(vision.image_size // vision.patch_size) ** 2,
        tower=None if tower is None else replace(tower, norm=inside.post_layernorm),
        **decoder(base.language_model),
    )


FAMILY = Family(name="paligemma", model_types=frozenset({"paligemma"}), parts=_parts)
