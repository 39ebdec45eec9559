"""LLaVA-1.5-7B as numbers, without weights, and every strategy as one stage on it: what its own decisions cost.

The shape is that of https://arxiv.org/abs/2310.03744: Vicuna-7B behind CLIP ViT-L/14 at 336 pixels, 576 visual tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from prunekit_evals import shapes

import prunekit
from prunekit import cost, families, plugins
from prunekit.pipeline.build import Pipeline
from prunekit.pipeline.forecast import LAST, forecast
from prunekit.strategy import declare
from prunekit.strategy.about import about
from prunekit.strategy.decisions import ModelShape

TEXT, KEPT = 64, 128  # text tokens of the prompt, and visual ones that stay where the file has to say how many
LIMIT = 0.02  # of dense prefill FLOPs, for the decisions of one strategy
CLIP = "clip-vit-large-patch14-336"
# What strategies need that do not run on their defaults.
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "skip_layers": {"layers": [24, 25]},
    "freeze_layers": {"layers": [24, 25]},
    "par": {"weights": None, "seed": 0},
    "fitprune": {
        "at": [f"{layer}.mid" for layer in range(32)],
        "keep": [round(1 - 0.025 * (layer + 1), 3) for layer in range(32)],
    },
}
# Strategies that decide without arithmetic on tokens, so that they state no `flops`: draws, places, pixels.
FREE: Mapping[str, str] = {
    "blind": "drops everything",
    "vtw": "drops everything",
    "random": "a draw",
    "first": "an order",
    "last": "an order",
    "stride": "places in the grid",
    "downsample": "a constant; the image is resized before the tower",
    "pixelprune": "differences of pixels before the tower, below the patch embedding",
    "evs": "differences of pixels before the tower, below the patch embedding",
}
# Strategies whose decisions cost more than LIMIT, and why.
DEAR: Mapping[str, str] = {}


@cache
def shape() -> ModelShape:
    """Its numbers, read off a model that holds no data."""
    config = transformers.AutoConfig.from_pretrained(shapes.folder("llava-1.5-7b"))
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(config)
    found: ModelShape = families.shape_of(model)
    return found


def clip_folder(folder: Path) -> Path:
    """A folder with the config of the CLIP model that the tower was taken from, and a file of weights that is empty.

    Enough to say what a strategy costs; nothing can be computed with it.
    """
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    vision = {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "patch_size": 14, "image_size": 336,
    }  # fmt: skip
    where = folder / CLIP
    transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=768).save_pretrained(where)
    (where / "model.safetensors").touch()
    return where


def decided(name: str, folder: Path) -> float | None:
    """FLOPs of a strategy's decisions over those of dense prefill, of one image and TEXT tokens.

    Of all its default sites; KEPT visual tokens stay where the file has to say. folder: for a stand-in of the CLIP
    model that two strategies want. None for a strategy that cannot stand on this model. A list of layers costs nothing.
    """
    if not runs_here(name):
        return None
    return 0.0 if free(name) else price(pipeline(name, folder))


def free(name: str) -> str:
    """Why its decisions cost nothing, or nothing that is counted; empty: they cost what it says."""
    layers = about(plugins.registry().get_strategy(name)).kind == "layer"
    return FREE.get(name, "it follows a list of layers" if layers else "")


def price(built: Pipeline) -> float:
    """FLOPs of the decisions of a pipeline on this model, over those of dense prefill."""
    bound = built.bind(shape())
    found = forecast(bound, TEXT)
    assert found is not None
    return found.decisions


def dense_flops() -> int:
    """Of the decoder's prefill of one image and TEXT tokens."""
    return cost.dense_flops(shape(), 576 + TEXT, LAST)


def runs_here(name: str) -> bool:
    """Its tower takes whole images, so that no patch can leave before it."""
    told = about(plugins.registry().get_strategy(name))
    return told.sites != ("pixels",) or told.kind == "image"


def pipeline(name: str, folder: Path) -> Pipeline:
    """The strategy alone."""
    return prunekit.load({"name": name, "stages": [stage_of(name, folder)]})


def stage_of(name: str, folder: Path) -> dict[str, Any]:
    """One stage as a pipeline file has it."""
    cls = plugins.registry().get_strategy(name)
    stage: dict[str, Any] = {"use": name, **OPTIONS.get(name, {})}
    if "keep_tokens" in declare.stage_keys(cls) and cls.__prunekit__.schedule is None and "keep" not in stage:
        stage["keep_tokens"] = KEPT
    if any(field.name == "clip" for field in dataclasses.fields(cls)):
        stage["clip"] = str(clip_folder(folder))
    return stage
