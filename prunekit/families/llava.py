"""LLaVA-1.5 (https://arxiv.org/abs/2310.03744): CLIP, SigLIP or Pixtral tower, projector, any plain decoder.

With CLIP and SigLIP every image has the same number of tokens, row by row on one square grid; with Pixtral
(https://arxiv.org/abs/2410.07073) images keep their sizes, and a token of text ends each row.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from prunekit.errors import Unsupported
from prunekit.families.base import Family, Modality, Parts
from prunekit.families.decoders import decoder
from prunekit.families.grids import pixels, square_coords
from prunekit.families.towers import LEADING_TOKENS, pixtral_tower, plain_tower


def _parts(model: PreTrainedModel) -> Parts:
    config: Any = model.config
    base: Any = model.model
    vision = config.vision_config
    free = vision.model_type == "pixtral"
    coords = pixels(vision.patch_size) if free else square_coords
    return Parts(
        family="llava",
        base=base,
        modalities=(Modality("image", "get_image_features", "pixel_values", (config.image_token_id,), coords),),
        visual_tokens=None if free else _tokens_per_image(config),
        tower=pixtral_tower(base.vision_tower, vision.patch_size, (base.multi_modal_projector,))
        if free
        else plain_tower(base.vision_tower, base.multi_modal_projector, config),
        **decoder(base.language_model),
    )


def _tokens_per_image(config: Any) -> int:
    vision = config.vision_config
    if vision.model_type not in LEADING_TOKENS:
        raise Unsupported(
            f"LLaVA with a '{vision.model_type}' tower is not supported by this version; "
            f"its tower must be one of: {', '.join(LEADING_TOKENS)}, pixtral"
        )
    patches: int = (vision.image_size // vision.patch_size) ** 2
    # "default" drops the first token whatever it is, "full" hands all of them on.
    dropped = config.vision_feature_select_strategy == "default"
    return int(patches + LEADING_TOKENS[vision.model_type] - dropped)


FAMILY = Family(name="llava", model_types=frozenset({"llava"}), parts=_parts)
