"""Ovis 2 (https://arxiv.org/abs/2405.20797): each patch, or square of them, is a mix of words of a visual vocabulary.

The model does not say which tiles make one image, so that every tile counts as an image of its own. The tokens that
frame images and tiles are text.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from prunekit.families.base import Family, Modality, Parts
from prunekit.families.decoders import decoder
from prunekit.families.grids import square_coords
from prunekit.families.patch_groups import blocks
from prunekit.families.tower_parts import Tower


def _parts(model: PreTrainedModel) -> Parts:
    config: Any = model.config
    base: Any = model.model
    vision, layers = config.vision_config, base.vision_tower.transformer.encoder.layers
    side, merge = vision.image_size // vision.patch_size, vision.hidden_stride
    whole = side % merge == 0  # else the tower pads what it merges
    return Parts(
        family="ovis2",
        base=base,
        modalities=(Modality("image", "get_image_features", "pixel_values", (config.image_token_id,), square_coords),),
        visual_tokens=(-(-side // merge)) ** 2,
        tower=Tower(layers, None, "attention", "ffn", patch_groups=blocks(merge)) if whole else None,
        **decoder(base.language_model),
    )


FAMILY = Family(name="ovis2", model_types=frozenset({"ovis2"}), parts=_parts)
