"""Idefics3 (https://arxiv.org/abs/2408.12637) and SmolVLM (https://arxiv.org/abs/2504.05299).

Tiles of one size, 3 x 3 or 4 x 4 patches shuffled into one token. All tiles of a prompt, of whatever image, are the
crops of one image to prunekit, as the model encodes them together.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from prunekit.families import patch_groups
from prunekit.families.base import Family, Modality, Parts
from prunekit.families.decoders import decoder
from prunekit.families.features import by_prompt
from prunekit.families.grids import stacked
from prunekit.families.images import whole
from prunekit.families.tower_parts import Tower


def _parts(model: PreTrainedModel) -> Parts:
    config: Any = model.config
    base: Any = model.model
    side = config.vision_config.image_size // config.vision_config.patch_size // config.scale_factor
    coords = stacked(side)
    return Parts(
        family="idefics3",
        base=base,
        modalities=(
            Modality("image", "get_image_features", "pixel_values", (config.image_token_id,), coords, by_prompt),
        ),
        tower=Tower(
            base.vision_model.encoder.layers,
            None,
            patch_groups=patch_groups.stacked(config.scale_factor),
            embedding=base.vision_model.embeddings.patch_embedding,
            mergers=(base.connector,),
            images=whole(),
            tokens=base.vision_model.embeddings.num_positions,
        ),
        **decoder(base.text_model),
    )


FAMILY = Family(name="idefics3", model_types=frozenset({"idefics3", "smolvlm"}), parts=_parts)
