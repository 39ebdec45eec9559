"""Mistral Small 3.1 and later (https://mistral.ai/news/mistral-small-3-1): Pixtral tower, images of any size.

2 x 2 patches become one token, and a token of text ends each row.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from prunekit.families.base import Family, Modality, Parts
from prunekit.families.decoders import decoder
from prunekit.families.grids import pixels
from prunekit.families.towers import pixtral_tower


def _parts(model: PreTrainedModel) -> Parts:
    config: Any = model.config
    base: Any = model.model
    patch, merge, projector = config.vision_config.patch_size, config.spatial_merge_size, base.multi_modal_projector
    mergers = (projector.patch_merger.merging_layer, projector.linear_1, projector.linear_2)
    return Parts(
        family="mistral3",
        base=base,
        modalities=(
            Modality("image", "get_image_features", "pixel_values", (config.image_token_id,), pixels(patch * merge)),
        ),
        tower=pixtral_tower(base.vision_tower, patch, mergers, merge),
        **decoder(base.language_model),
    )


FAMILY = Family(name="mistral3", model_types=frozenset({"mistral3"}), parts=_parts)
