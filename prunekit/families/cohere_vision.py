"""Aya Vision (https://arxiv.org/abs/2505.08751) and Command A Vision: tiles of one size, 2 x 2 patches in one token.

Their decoder runs attention and MLP side by side, and three of four layers see a window only. The model does not say
which tiles make one image, so that every tile counts as an image of its own.
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
    return Parts(
        family="cohere_vision",
        base=base,
        modalities=(Modality("image", "get_image_features", "pixel_values", (config.image_token_id,), square_coords),),
        tower=plain_tower(
            base.vision_tower, None, config, blocks(config.downsample_factor), merger=base.multi_modal_projector
        ),
        **decoder(base.language_model),
    )


FAMILY = Family(name="cohere_vision", model_types=frozenset({"aya_vision", "cohere2_vision"}), parts=_parts)
