"""PerceptionLM (https://arxiv.org/abs/2504.13180): tiles of one size, whose patches are pooled to one square grid each.

The model does not say which tiles make one image, so that every tile counts as an image of its own. Its tower comes
from timm, whose blocks are neither cut nor read. Videos go through the same method as images and are refused.
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
        family="perception_lm",
        base=base,
        modalities=(Modality("image", "get_image_features", "pixel_values", (config.image_token_id,), square_coords),),
        **decoder(base.language_model),
    )


FAMILY = Family(name="perception_lm", model_types=frozenset({"perception_lm"}), parts=_parts)
