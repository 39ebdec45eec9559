"""FastVLM (https://arxiv.org/abs/2412.13303): a convolutional tower whose last map is one square grid of visual tokens.

Such a tower is not made of blocks that take a list of patches, so that it is neither cut nor read.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from prunekit.families.base import Family, Modality, Parts
from prunekit.families.decoders import decoder
from prunekit.families.grids import square_coords


def _parts(model: PreTrainedModel) -> Parts:
    config: Any = model.config
    base: Any = model.model
    return Parts(
        family="fast_vlm",
        base=base,
        modalities=(Modality("image", "get_image_features", "pixel_values", (config.image_token_id,), square_coords),),
        **decoder(base.language_model),
    )


FAMILY = Family(name="fast_vlm", model_types=frozenset({"fast_vlm"}), parts=_parts)
