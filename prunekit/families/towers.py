"""Vision towers that several families share; see `Tower`."""

from __future__ import annotations

from typing import Any

from torch import nn

from prunekit.families.images import in_patches, padded, whole
from prunekit.families.patch_groups import PatchGroups, by_size, merged, parts, selected
from prunekit.families.tower_parts import Tower
from prunekit.upstream import feature_layers

# Towers that see every image at one size, and the tokens they put in front of the patches.
LEADING_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0}


def plain_tower(
    tower: Any,
    projector: nn.Module | None,
    config: Any,
    groups: PatchGroups | None = None,
    strategy: str | None = None,
    merger: nn.Module | None = None,
) -> Tower | None:
    """A CLIP or SigLIP tower; None for any other.

    projector: as in `Tower`; merger: where it is none, the module that makes visual tokens. groups: its `patch_groups`,
    None if every patch is a visual token. strategy: what of the tower's tokens becomes visual tokens, "default" or
    "full"; None: as the config says.
    """
    kind = config.vision_config.model_type
    if kind not in LEADING_TOKENS:
        return None
    inside = getattr(tower, "vision_model", tower)
    chosen = feature_layers(config)
    leading = LEADING_TOKENS[kind]
    states = len(inside.encoder.layers) + 1
    several = not isinstance(chosen, int)
    mapping, merging = (None, projector or merger) if several else (projector, merger)
    strategy = str(strategy or getattr(config, "vision_feature_select_strategy", "full"))
    handed = inside.embeddings.num_positions - (strategy == "default")
    if groups is not None and (strategy == "default") != bool(leading):
        return None  # a patch is missing, or CLS stands among them
    return Tower(
        layers=inside.encoder.layers,
        projector=mapping,
        leading=leading,
        feature_layer=max((one % states for one in chosen), default=0) if several else chosen,
        patch_groups=groups or selected(leading, strategy),
        pool=getattr(inside, "head", None),
        embedding=inside.embeddings.patch_embedding,
        mergers=() if merging is None else (merging,),
        images=whole(),
        tokens=inside.embeddings.num_positions,
        mapped={} if mapping is None else {"image": handed, "video": handed},
    )


def packed_tower(tower: Any, merge: int, window: int | None = None) -> Tower:
    """A tower that takes all images or videos as one sequence, in which the patches of a visual token stand together.

    window: as in `patch_groups.merged`.
    """
    sizes, config = {"image": "image_grid_thw", "video": "video_grid_thw"}, tower.config
    last = tuple(module for module in (getattr(tower, "downsample", None), tower.merger) if module is not None)
    early = tuple(getattr(tower, "deepstack_merger_list", ()))  # between blocks
    behind = [len(tower.blocks) - 1] * len(last) + list(getattr(tower, "deepstack_visual_indexes", ()))
    return Tower(
        tower.blocks,
        None,
        attention="attn",
        patch_groups=merged(sizes, merge, window),
        packed=True,
        embedding=tower.patch_embed,
        mergers=(*last, *early),
        behind=tuple(behind),
        images=in_patches(sizes, merge, config.patch_size, config.temporal_patch_size, config.in_channels),
        parts=parts(sizes, merge, window, getattr(config, "fullatt_block_indexes", ())),
    )


def pixtral_tower(tower: Any, patch: int, mergers: tuple[nn.Module, ...], merge: int = 1) -> Tower:
    """Pixtral (https://arxiv.org/abs/2410.07073): images of their own sizes as one sequence, row by row."""
    return Tower(
        tower.transformer.layers,
        None,
        "attention",
        "feed_forward",
        patch_groups=by_size(patch, merge),
        packed=True,
        embedding=tower.patch_conv,
        mergers=mergers,
        images=padded(patch, merge),
    )
