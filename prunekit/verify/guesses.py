"""What prompts of an unknown model may be made of: guesses that follow what its encoders and its forward take."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from prunekit.families.base import Parts
from prunekit.verify import tiny_visual_inputs as draw
from prunekit.verify.tiny_models import BEGIN, END
from prunekit.verify.tiny_prompts import Recipe, image_tiles, video_frames

# Arguments that say what each token is, and their values for text, image and video.
TYPES = {"mm_token_type_ids": (0, 1, 2), "token_type_ids": (0, 1, 0), "moe_mm_token_type_ids": (0, 1, 1)}


@dataclass(frozen=True)
class Form:
    """A form of images, and of videos beside them, whose names are those of an encoder's arguments.

    stacked: as in `Recipe`, both in turn where both are known. setting: what a config must have; empty: nothing.
    """

    image: draw.Draw
    names: frozenset[str]
    videos: tuple[draw.Draw, ...] = ()
    stacked: tuple[bool, ...] = (False,)
    setting: str = ""


def _form(
    image: draw.Draw, names: str, *videos: draw.Draw, stacked: tuple[bool, ...] = (False,), setting: str = ""
) -> Form:
    return Form(image, frozenset(names.split()), videos, stacked, setting)


MOVING = (draw.video_patches, draw.even_video_patches)
FORMS = (
    _form(draw.patches, "pixel_values image_grid_thw", *MOVING),
    _form(draw.unfolded(draw.patches), "pixel_values image_grid_thw", *map(draw.unfolded, MOVING)),
    _form(
        draw.with_merges(draw.patches, 2), "pixel_values image_grid_thw image_merge_sizes",
        *(draw.with_merges(one, 2) for one in MOVING),
    ),
    _form(draw.padded_patches, "pixel_values spatial_shapes pixel_attention_mask"),
    _form(draw.masked_tiles, "pixel_values pixel_attention_mask", stacked=(True,)),
    _form(draw.flagged_tiles, "pixel_values pixel_attention_mask", stacked=(True,)),
    _form(draw.anyres, "pixel_values image_sizes", draw.frames, setting="image_grid_pinpoints"),
    _form(draw.any_size, "pixel_values image_sizes"),
    _form(draw.placed_patches, "pixel_values image_position_ids", draw.placed_frames),
    _form(draw.strips, "pixel_values target_sizes"),
    _form(draw.pooled, "pixel_values image_token_pooling image_grids"),
    _form(draw.two_sizes, "pixel_values high_res_pixel_values"),
    _form(draw.square, "pixel_values", draw.frames, stacked=(False, True)),
    _form(draw.two_tiles, "pixel_values"),
    _form(draw.flat_patches, "pixel_values", setting="patch_size"),
)  # fmt: skip


@dataclass(frozen=True)
class Guess:
    """A recipe, and which kinds of visual inputs its prompts hold."""

    recipe: Recipe
    kinds: tuple[str, ...] = ("image",)


def rows_of(recipe: Recipe) -> tuple[tuple[str, ...], ...]:
    """Two rows with all that a recipe's prompts may hold."""
    if recipe.shared_id:
        return ("video",), ("video", "video")
    return (("image", "image"), ("video",)) if recipe.video else (("image",), ("image", "image"))


def guesses(model: Any, parts: Parts) -> Iterator[Guess]:
    """Recipes for `model`, which has these parts: images and videos first, then images alone."""
    methods = {modality.name: inspect.signature(getattr(parts.base, modality.method)) for modality in parts.modalities}
    forward = inspect.signature(type(model).forward).parameters
    types = {name: values for name, values in TYPES.items() if name in forward}
    shared = len({modality.token_ids for modality in parts.modalities}) < len(parts.modalities)
    recipes = [
        (Recipe(form.image, types=types, stacked=stacked, around=((BEGIN,), (END,))), form)
        for form in FORMS
        if _fits(form, methods["image"]) and (not form.setting or getattr(model.config, form.setting, None))
        for stacked in form.stacked
    ]
    for recipe, form in recipes:
        for video in form.videos if "video" in methods else ():
            for moving in _moving(replace(recipe, video=video), shared):
                yield Guess(moving, ("image", "video"))
    for recipe, _ in recipes:
        yield Guess(recipe)
        yield Guess(replace(recipe, runs=image_tiles))


def _moving(recipe: Recipe, shared: bool) -> Iterator[Recipe]:
    """With videos in one run, or in one for each frame; behind their own id, or that of images."""
    for shared_id in (True,) if shared else (False, True):
        yield replace(recipe, shared_id=shared_id)
        yield replace(recipe, shared_id=shared_id, runs=video_frames, stamped=True)


def _fits(form: Form, method: inspect.Signature) -> bool:
    """Whether a method takes all that a form brings, and needs nothing else."""
    needed = {
        name
        for name, one in method.parameters.items()
        if one.default is one.empty and one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)
    }
    return needed <= form.names <= set(method.parameters)
