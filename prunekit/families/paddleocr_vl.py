"""PaddleOCR-VL (https://arxiv.org/abs/2510.14528): images of any size, positions of three axes, 2 x 2 patches a token.

Its tower takes the patches of all images as one sequence, row by row.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from prunekit.families import patch_groups
from prunekit.families.base import Family, Modality, Parts
from prunekit.families.decoders import decoder
from prunekit.families.grids import merged
from prunekit.families.tower_parts import Tower


def _parts(model: PreTrainedModel) -> Parts:
    config: Any = model.config
    base: Any = model.model
    merge, sizes = config.vision_config.spatial_merge_size, "image_grid_thw"
    coords = merged(sizes, merge)
    blocks = base.visual.vision_model.encoder.layers
    return Parts(
        family="paddleocr_vl",
        base=base,
        modalities=(Modality("image", "get_image_features", "pixel_values", (config.image_token_id,), coords),),
        tower=Tower(blocks, None, patch_groups=patch_groups.by_rows(sizes, merge), packed=True),
        **decoder(base.language_model),
    )


FAMILY = Family(name="paddleocr_vl", model_types=frozenset({"paddleocr_vl"}), parts=_parts)
