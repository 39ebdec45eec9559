"""InternVL 3 (https://arxiv.org/abs/2504.10479): tiles of one size, 2 x 2 patches shuffled into one token.

The model does not say which tiles make one image, so that every tile counts as an image of its own, also a frame.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from prunekit.families.base import Family, Modality, Parts
from prunekit.families.decoders import decoder
from prunekit.families.grids import square_coords
from prunekit.families.images import whole
from prunekit.families.patch_groups import blocks
from prunekit.families.tower_parts import Tower


def _parts(model: PreTrainedModel) -> Parts:
    config: Any = model.config
    base: Any = model.model
    return Parts(
        family="internvl",
        base=base,
        modalities=(Modality("image", "get_image_features", "pixel_values", (config.image_token_id,), square_coords),),
        tower=_tower(base, config),
        **decoder(base.language_model),
    )


def _tower(base: Any, config: Any) -> Tower | None:
    if config.vision_feature_select_strategy != "default" or not isinstance(config.vision_feature_layer, int):
        return None
    merge = round(1 / config.downsample_ratio)
    embeddings = base.vision_tower.embeddings.patch_embeddings
    return Tower(
        base.vision_tower.encoder.layer,
        None,
        "attention",
        leading=1,
        feature_layer=config.vision_feature_layer,
        patch_groups=blocks(merge),
        embedding=embeddings,
        mergers=(base.multi_modal_projector,),
        images=whole(),
        tokens=embeddings.num_patches + 1,
    )


FAMILY = Family(name="internvl", model_types=frozenset({"internvl"}), parts=_parts)
