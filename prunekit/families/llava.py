"""LLaVA-1.5 (https://arxiv.org/abs/2310.03744): CLIP or SigLIP tower, projector, Llama-style decoder, one square
grid an image.
"""

from __future__ import annotations

from transformers import PreTrainedModel

from prunekit.families.base import Family, Parts, square_grid


def _parts(model: PreTrainedModel) -> Parts:
    base = model.model
    text = base.language_model
    vision = model.config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    # "default" drops the CLS token that the tower put in front of the patches; "full" hands it on.
    drops_cls = model.config.vision_feature_select_strategy == "default"
    return Parts(
        family="llava",
        base=base,
        text=text,
        layers=text.layers,
        visual_ids=(model.config.image_token_id,),
        coords=square_grid,
        visual_tokens=patches if drops_cls else None,
    )


FAMILY = Family(name="llava", model_types=frozenset({"llava"}), parts=_parts)
