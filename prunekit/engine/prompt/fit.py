"""Whether what a processor has made fits the model: how many visual tokens a prompt has, and what shape its pixels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor

from prunekit.engine.prompt.call import Call
from prunekit.engine.prompt.visual_inputs import counts_of
from prunekit.errors import InputError, PrunekitError
from prunekit.families.base import Modality, Parts

# What decides how many visual tokens an image has: of configs, of processors, and of their image processors.
DECIDES = (
    "patch_size", "temporal_patch_size", "spatial_patch_size", "spatial_merge_size", "merge_size", "image_size", "size",
    "crop_size", "max_pixels", "image_seq_length", "image_seq_len", "mm_tokens_per_image", "scale_factor",
    "downsample_factor", "downsample_ratio", "pixel_shuffle_factor", "num_additional_image_tokens",
    "vision_feature_select_strategy",
)  # fmt: skip


def check_counts(call: Call, processor: Any, shown: int | None = None) -> None:
    """Raise InputError where a prompt has other numbers of visual tokens than its images and videos have features.

    processor: the model's, as far as it is known. shown: visual tokens of the prompt without those that are masked; if
    they are as many as the features, nothing is read back from the device. None: not counted yet.
    """
    outputs, ids = call.outputs, call.given.get("input_ids")
    encoded = [m for m in call.parts.modalities if getattr(outputs.get(m.name), "pooler_output", None) is not None]
    made = sum(_features(modality, outputs[modality.name].pooler_output) for modality in encoded)
    if not encoded or ids is None or shown == made:
        return
    tokens = torch.tensor([token for modality in encoded for token in modality.token_ids], device=ids.device)
    if (placed := int(torch.isin(ids, tokens).sum())) != made:
        names = " and ".join(modality.name for modality in encoded)
        # Repeated for beams they are dealt out by what the prompt has, and may be lost.
        made = made or sum(sum(source.counts) for source in call.sources())
        raise InputError(
            f"the prompt has {placed} {names} tokens, for which the model makes {made} features; "
            + _both(call.parts, processor)
        )


def _features(modality: Modality, pooled: Any) -> int:
    """Features in a `pooler_output`: of each input, or of all in one table (features, H)."""
    whole = isinstance(pooled, Tensor) and pooled.ndim == 2
    return len(pooled) if whole else sum(counts_of(modality.features({}, pooled)))


def explain(error: Exception, modality: Modality, parts: Parts, processor: Any) -> None:
    """Raise InputError for an error about the shape of pixels that an encoding method has raised."""
    about_shapes = any(word in str(error).lower() for word in ("size", "shape"))
    if about_shapes and not isinstance(error, (PrunekitError, torch.OutOfMemoryError)):
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"the model could not encode its {modality.name}s ({reason}); {_both(parts, processor)}"
        ) from error


def _both(parts: Parts, processor: Any) -> str:
    """What the configs of both sides say, and what to do."""
    config: Any = parts.base.config
    model = _said(type(config).__name__, {"": config, "vision_config.": getattr(config, "vision_config", None)})
    told = f"the prompt has to come from the model's own processor. The model is {model}"
    if processor is None:
        return f"{told}; with apply(..., processor=processor) this says what the processor is"
    places = {"": processor, "image_processor.": getattr(processor, "image_processor", None)}
    return f"{told}, the processor {_said(type(processor).__name__, places)}"


def _said(name: str, places: Mapping[str, Any]) -> str:
    values = ((prefix + key, getattr(place, key, None)) for prefix, place in places.items() for key in DECIDES)
    return f"{name}({', '.join(f'{key}={_plain(value)}' for key, value in values if value is not None)})"


def _plain(value: Any) -> Any:
    """A size as a dict of what it says."""
    return {key: one for key, one in vars(value).items() if one is not None} if is_dataclass(value) else value
