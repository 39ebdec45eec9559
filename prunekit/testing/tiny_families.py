"""Tiny random models of every family, and prompt batches for them: no download, no processor, milliseconds a forward.

`tiny_model("qwen2_5_vl")` and `tiny_batch(model)` go straight into `generate`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from prunekit.testing.tiny_configs import CONFIGS, PATCH
from prunekit.verify import tiny_prompts
from prunekit.verify import tiny_visual_inputs as draw
from prunekit.verify.tiny_models import BEGIN, END, NEWLINE, tiny_from_config
from prunekit.verify.tiny_prompts import ROWS, Recipe, Row, TinyBatch, encode, image_tiles, row_of, video_frames

__all__ = [
    "RECIPES", "ROWS", "TinyBatch", "encode", "row_of", "takes_video", "tiny_batch", "tiny_from_config", "tiny_model",
    "tiny_names",
]  # fmt: skip


def _patch_rows(kind: str, tensors: Mapping[str, Tensor]) -> int:
    """Each row of merged patches ends with a token of its own."""
    return int(tensors["image_sizes"][0, 0]) // (2 * PATCH)


def two_runs(_: str, tensors: Mapping[str, Tensor]) -> int:
    """Both tiles of an image stand apart."""
    return tensors["pixel_values"].shape[1]


FENCED = ((BEGIN,), (END,))
M_ROPE = {"mm_token_type_ids": (0, 1, 2)}
QWEN2 = Recipe(draw.patches, draw.video_patches, FENCED, types=M_ROPE)
STAMPED = replace(QWEN2, runs=video_frames, stamped=True)
GLM = replace(STAMPED, shared_id=True)
IDEFICS = Recipe(draw.masked_tiles, None, FENCED, image_tiles, stamped=True, stacked=True)
GEMMA4 = Recipe(draw.placed_patches, draw.placed_frames, FENCED, types=M_ROPE)
RECIPES: dict[str, Recipe] = {
    "llava": Recipe(draw.square),
    "llava_next": Recipe(draw.anyres),
    "llava_next_video": Recipe(draw.anyres, draw.frames),
    "llava_onevision": Recipe(draw.anyres, draw.frames, counted=True),
    "vipllava": Recipe(draw.square),
    "qwen2_vl": QWEN2,
    "qwen2_5_vl": QWEN2,
    "qwen3_vl": STAMPED,
    "qwen3_vl_moe": STAMPED,
    "qwen3_5": STAMPED,
    "qwen3_5_moe": STAMPED,
    "internvl": Recipe(draw.tiles, None, FENCED),
    "gemma3": Recipe(draw.square, None, FENCED, types={"token_type_ids": (0, 1, 0)}),
    "paligemma": Recipe(draw.square, types={"token_type_ids": (0, 0, 0)}),
    "idefics3": IDEFICS,
    "smolvlm": IDEFICS,
    "mistral3": Recipe(draw.any_size, None, ((), (NEWLINE,)), _patch_rows),
    "glm4v": GLM,
    "glm46v": GLM,
    "glm4v_moe": GLM,
    "aya_vision": Recipe(draw.tiles, None, FENCED, image_tiles),
    "cohere2_vision": Recipe(draw.tiles, None, FENCED, image_tiles),
    "gemma3n": Recipe(draw.square, None, FENCED),
    "gemma4": GEMMA4,
    "gemma4_unified": GEMMA4,
    "paddleocr_vl": Recipe(draw.unfolded(draw.patches), None, FENCED, types=M_ROPE),
    "ovis2": Recipe(draw.square, None, FENCED),
    "fast_vlm": Recipe(draw.square),
    "perception_lm": Recipe(draw.two_tiles, None, FENCED, two_runs),
    "molmo2": Recipe(draw.pooled, None, FENCED, types=M_ROPE),
}


def tiny_names() -> tuple[str, ...]:
    """The `model_type` of every family that has a tiny model."""
    return tuple(RECIPES)


def takes_video(family: str) -> bool:
    """Whether prompts of this family may hold videos."""
    return RECIPES[family].video is not None


def tiny_model(
    family: str, attention: str = "sdpa", dtype: torch.dtype = torch.float64, layers: int = 6, seed: int = 0
) -> Any:
    """As `prunekit.verify.tiny_models.tiny_from_config`, of a family: a `model_type`, one of `tiny_names()`.

    Raises KeyError for an unknown family.
    """
    return tiny_from_config(CONFIGS[family](layers), attention, dtype, seed)


def tiny_batch(
    model: Any,
    rows: Sequence[Row] = ROWS,
    seed: int = 0,
    text: Sequence[int] | int | None = None,
    recipe: Recipe | None = None,
) -> TinyBatch:
    """As `prunekit.verify.tiny_prompts.tiny_batch`. recipe: None takes that of the model's family.

    Raises KeyError for a model of an unknown family without a recipe.
    """
    return tiny_prompts.tiny_batch(model, recipe or RECIPES[model.config.model_type], rows, seed, text)
