"""LLaVA-1.5 (https://arxiv.org/abs/2310.03744): CLIP or SigLIP tower, projector, Llama-style decoder.

Every image has the same number of tokens, row by row on one square grid.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from prunekit.errors import Unsupported
from prunekit.families.base import Family, Modality, Parts, square_places

# Towers that see every picture at one size, and the tokens they put in front of the patches.
LEADING_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0}


def _parts(model: PreTrainedModel) -> Parts:
    config: Any = model.config
    base: Any = model.model
    return Parts(
        family="llava",
        base=base,
        text=base.language_model,
        layers=base.language_model.layers,
        modalities=(Modality("image", "get_image_features", "pixel_values", (config.image_token_id,), square_places),),
        visual_tokens=_tokens_per_image(config),
    )


def _tokens_per_image(config: Any) -> int:
    vision = config.vision_config
    if vision.model_type not in LEADING_TOKENS:
        raise Unsupported(
            f"LLaVA with a '{vision.model_type}' tower is not supported by this version; "
            f"its tower must be one of: {', '.join(LEADING_TOKENS)}"
        )
    patches: int = (vision.image_size // vision.patch_size) ** 2
    # "default" drops the first token whatever it is, "full" hands all of them on.
    dropped = config.vision_feature_select_strategy == "default"
    return int(patches + LEADING_TOKENS[vision.model_type] - dropped)


FAMILY = Family(name="llava", model_types=frozenset({"llava"}), parts=_parts)
