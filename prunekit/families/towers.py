"""Vision towers that several families share: one row of patches for each picture or crop, every patch on one grid."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.families.base import Tower

# Towers that see every picture at one size, and the tokens they put in front of the patches.
LEADING_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0}
Units = Callable[[str, Mapping[str, Any], int, int], list[Tensor]]


def plain_tower(tower: Any, projector: nn.Module, config: Any) -> Tower | None:
    """A CLIP or SigLIP tower whose patches become one visual token each; None for any other."""
    kind = config.vision_config.model_type
    if kind not in LEADING_TOKENS:
        return None
    inside = getattr(tower, "vision_model", tower)
    chosen, leading = config.vision_feature_layer, LEADING_TOKENS[kind]
    states = len(inside.encoder.layers) + 1
    several = not isinstance(chosen, int)
    return Tower(
        layers=inside.encoder.layers,
        projector=None if several else projector,
        leading=leading,
        feature_layer=max((one % states for one in chosen), default=0) if several else chosen,
        units=selected(leading, config.vision_feature_select_strategy),
        pool=getattr(inside, "head", None),
    )


def selected(leading: int, strategy: str) -> Units:
    """Units of one patch each. "default" drops the first token, whatever it is; "full" hands all of them on."""

    def units(modality: str, arguments: Mapping[str, Any], rows: int, patches: int) -> list[Tensor]:
        wanted = arguments.get("vision_feature_select_strategy") or strategy
        first = (1 if wanted == "default" else 0) - leading
        one = torch.arange(first, patches)
        return [torch.where(one < 0, -1, one + row * patches)[:, None] for row in range(rows)]

    return units
