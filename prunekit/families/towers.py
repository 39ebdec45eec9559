"""Vision towers that several families share; see `Tower`."""

from __future__ import annotations

from typing import Any

from torch import nn

from prunekit.families.base import Tower
from prunekit.families.units import Units, by_size, merged, selected

# Towers that see every picture at one size, and the tokens they put in front of the patches.
LEADING_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0}


def plain_tower(
    tower: Any, projector: nn.Module | None, config: Any, units: Units | None = None, strategy: str | None = None
) -> Tower | None:
    """A CLIP or SigLIP tower; None for any other.

    projector: as in `Tower`. units: None if every patch is a visual token. strategy: what of the tower's tokens becomes
    visual tokens, "default" or "full"; None: as the config says.
    """
    kind = config.vision_config.model_type
    if kind not in LEADING_TOKENS:
        return None
    inside = getattr(tower, "vision_model", tower)
    chosen: Any = getattr(config, "vision_feature_layer", -1)
    leading = LEADING_TOKENS[kind]
    states = len(inside.encoder.layers) + 1
    several = not isinstance(chosen, int)
    strategy = str(strategy or getattr(config, "vision_feature_select_strategy", "full"))
    if units is not None and (strategy == "default") != bool(leading):
        return None  # a patch is missing, or CLS stands among them
    return Tower(
        layers=inside.encoder.layers,
        projector=None if several else projector,
        leading=leading,
        feature_layer=max((one % states for one in chosen), default=0) if several else chosen,
        units=units or selected(leading, strategy),
        pool=getattr(inside, "head", None),
    )


def packed_tower(tower: Any, merge: int, window: int | None = None) -> Tower:
    """A tower that takes all pictures as one sequence, in which the patches of a visual token stand together.

    window: as in `units.merged`.
    """
    sizes = {"image": "image_grid_thw", "video": "video_grid_thw"}
    return Tower(tower.blocks, None, attention="attn", units=merged(sizes, merge, window), packed=True)


def pixtral_tower(tower: Any, patch: int, merge: int = 1) -> Tower:
    """Pixtral (https://arxiv.org/abs/2410.07073): pictures of their own sizes as one sequence, row by row."""
    layers = tower.transformer.layers
    return Tower(layers, None, "attention", "feed_forward", units=by_size(patch, merge), packed=True)
