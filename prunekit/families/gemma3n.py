"""Gemma 3n (https://ai.google.dev/gemma/docs/gemma-3n): a convolutional tower that gives one square grid an image.

The last layers attend to the keys and values of earlier ones, and hidden states are several streams (AltUp).
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
        family="gemma3n",
        base=base,
        modalities=(Modality("image", "get_image_features", "pixel_values", (config.image_token_id,), square_coords),),
        visual_tokens=config.vision_soft_tokens_per_image,
        **decoder(base.language_model),
    )


FAMILY = Family(name="gemma3n", model_types=frozenset({"gemma3n"}), parts=_parts)
