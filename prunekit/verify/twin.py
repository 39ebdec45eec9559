"""A tiny twin of any LVLM: the same classes, the same geometry of images, two heads, six layers, 120 words.

Widths shrink; sizes of images and patches stay, because configs count their tokens in many ways, and so does the
depth of a tower whose blocks a config names.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from prunekit.errors import Unsupported
from prunekit.families.base import Parts
from prunekit.upstream import feature_layers
from prunekit.verify import tiny_visual_inputs as draw
from prunekit.verify.tiny_models import BEGIN, BOS, END, HEADS, IMAGE, PAD, VIDEO, VOCABULARY, WINDOW, tiny_from_config
from prunekit.verify.tiny_prompts import Recipe, image_tiles, tiny_batch, video_frames

LAYERS = 6
EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts")
# Numbers that only make a decoder with experts smaller.
LIMITS = {
    "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "sliding_window": WINDOW, "vocab_size_per_layer_input": VOCABULARY,
    "attention_chunk_size": WINDOW, "keep_window_size": WINDOW,
} | dict.fromkeys(EXPERTS, 4)  # fmt: skip
TOKENS = {
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": None,
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
}


def twin_of(config: Any) -> Any:
    """A small model with random weights from a shrunken copy of `config`, in float64; eager where it has no sdpa.

    Raises Unsupported when no such model can be made, with the reason.
    """
    reasons = []
    for attention in ("sdpa", "eager"):
        try:
            return tiny_from_config(shrunken(config), attention)
        except Exception as error:  # configs of unknown models fail in any way
            reasons.append(f"{attention}: {type(error).__name__}: {str(error).partition(chr(10))[0][:200]}")
    raise Unsupported(
        f"no tiny twin of {type(config).__name__} can be made, so that nothing can be proved about it: "
        f"{'; '.join(reasons)}"
    )


def shrunken(config: Any) -> Any:
    """A copy of an LVLM's config with small numbers that still fit each other."""
    small = copy.deepcopy(config)
    text = small.get_text_config()
    wide = {_shrink_text(text)[0]: text.hidden_size}
    vision = getattr(small, "vision_config", None)
    if vision is not None and any(hasattr(vision, name) for name in HEADS):
        _shrink_vision(small, vision, wide)
    for name, value in list(vars(small).items()):
        if isinstance(value, int) and ("intermediate" in name or (value in wide and _is_width(name))):
            setattr(small, name, wide.get(value, 64))
    for part in {id(small): small, id(text): text}.values():
        part.tie_word_embeddings = False
        _rename_tokens(part)
    for name in ("quantization_config", "dtype"):
        if getattr(small, name, None) is not None:
            delattr(small, name) if name == "quantization_config" else setattr(small, name, None)
    return small


def _shrink_text(text: Any) -> tuple[int, int]:
    """Two heads of their own size; returns the width before and after."""
    own = _numbers_of_layers(text)
    before, layers, text.vocab_size = text.hidden_size, text.num_hidden_layers, VOCABULARY
    if getattr(text, "num_attention_heads", None):
        size = getattr(text, "head_dim", None) or before // text.num_attention_heads
        keys = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        text.num_key_value_heads = 2 if keys == text.num_attention_heads else 1
        text.num_attention_heads, text.hidden_size = 2, 2 * size
        many = isinstance(text.intermediate_size, (list, tuple))
        text.intermediate_size = [2 * text.hidden_size] * layers if many else 2 * text.hidden_size
    text.num_hidden_layers = min(layers, LAYERS)
    for name, value in list(vars(text).items()):
        if isinstance(value, (list, tuple)) and len(value) == layers:
            setattr(text, name, value[: text.num_hidden_layers])
        elif name in LIMITS and isinstance(value, int) and not isinstance(value, bool):
            setattr(text, name, min(value, LIMITS[name]))
    if own:
        text.per_layer_config = {number: own[number] for number in range(text.num_hidden_layers)}
    if shared := getattr(text, "num_kv_shared_layers", 0):
        _share(text, min(shared, text.num_hidden_layers // 2))
    return before, text.hidden_size


def _share(text: Any, shared: int) -> None:
    """Let the last layers read keys and values of earlier ones, of each kind one, as in the whole."""
    kinds = list(dict.fromkeys(reversed(text.layer_types)))
    layers = range(text.num_hidden_layers)
    text.layer_types = [kinds[(layers[-1] - layer) % len(kinds)] for layer in layers]
    text.num_kv_shared_layers = shared


def _numbers_of_layers(text: Any) -> list[dict[str, Any]]:
    """Takes out of a config the numbers in which its layers differ, and returns those of each layer; empty: in none."""
    if not getattr(text, "is_heterogeneous", False):
        return []
    names = [name for name in text.per_layer_attributes if name not in ("intermediate_size", "num_attention_heads")]
    own = [{name: getattr(one, name) for name in names} for one in text.per_layer_config]
    text.per_layer_config = None
    for numbers in own:
        if "num_key_value_heads" in numbers:
            numbers["num_key_value_heads"] = 1
    return own


def _shrink_vision(small: Any, vision: Any, wide: Mapping[int, int]) -> None:
    """Two heads of 32, and what feeds the decoder as wide as it is now."""
    width = "embed_dim" if hasattr(vision, "embed_dim") else "hidden_size"
    setattr(vision, next(name for name in HEADS if hasattr(vision, name)), 2)
    for name, value in list(vars(vision).items()):
        if name != width and isinstance(value, int) and value in wide and _is_width(name):
            setattr(vision, name, wide[value])
    setattr(vision, width, 64)
    smaller = {"intermediate_size": 96, "head_dim": 32}
    if not _named_layers(small, vision):
        smaller |= dict.fromkeys(("num_hidden_layers", "depth"), 4)
    for name, value in smaller.items():
        if getattr(vision, name, None) is not None:
            setattr(vision, name, value)


def _named_layers(small: Any, vision: Any) -> bool:
    """Whether configs name blocks of the tower that a tower of four blocks would not have."""
    chosen = feature_layers(small)
    lists = [name for name, value in vars(vision).items() if isinstance(value, (list, tuple)) and "index" in name]
    return bool(lists) or not isinstance(chosen, int) or not -4 <= chosen <= 4


def _is_width(name: str) -> bool:
    return "hidden" in name or "dim" in name


def _rename_tokens(config: Any) -> None:
    """Ids below the first word, so that the small vocabulary holds them and none is generated."""
    later = iter(range(VIDEO + 1, END + 1))
    for name, value in list(vars(config).items()):
        usual = name.replace("_token_index", "_token_id")
        if usual in TOKENS and value is not None:
            setattr(config, name, TOKENS[usual])
        elif usual.endswith("token_id") and isinstance(value, int):
            setattr(config, name, next(later, END))
        elif usual.endswith("token_ids") and isinstance(value, (list, tuple)):
            setattr(config, name, [END + 1 + n % 3 for n in range(len(value))])


def recipe_for(model: Any, parts: Parts) -> Recipe:
    """How prompts for `model`, which has these parts, are made: the first guess that it runs on.

    Guesses follow what its encoders and its forward take. Raises Unsupported when it runs on none of them.
    """
    errors = []
    for recipe in _guesses(model, parts):
        try:
            with torch.no_grad():
                model(**tiny_batch(model, recipe, rows_of(recipe)))
        except Exception as error:  # a model that is called with something else fails in any way
            video = f" and {recipe.video.__name__}" if recipe.video else ""
            errors.append(
                f"{recipe.image.__name__}{video}: {type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
            )
        else:
            return recipe
    raise Unsupported(f"{type(model).__name__} runs on none of the inputs that prunekit can make ({'; '.join(errors)})")


def rows_of(recipe: Recipe) -> tuple[tuple[str, ...], ...]:
    """Two rows with all that a recipe's prompts may hold."""
    if recipe.shared_id:
        return ("video",), ("video", "video")
    return (("image", "image"), ("video",)) if recipe.video else (("image",), ("image", "image"))


def _guesses(model: Any, parts: Parts) -> Iterator[Recipe]:
    image = _arguments(model, "get_image_features")
    video = _arguments(model, "get_video_features")
    forward = inspect.signature(type(model).forward).parameters
    usual = {"mm_token_type_ids": (0, 1, 2), "token_type_ids": (0, 1, 0)}
    types = {name: values for name, values in usual.items() if name in forward}
    ids = [modality.token_ids for modality in parts.modalities]
    for one, stacked in _draws(image):
        recipe = Recipe(
            one, types=types, stacked=stacked, around=((BEGIN,), (END,)), shared_id=len(set(ids)) < len(ids)
        )
        if not video:
            yield recipe
            yield replace(recipe, runs=image_tiles)
        else:
            moving = replace(recipe, video=_video_draw(video))
            yield moving
            yield replace(moving, runs=video_frames, stamped=True)


def _arguments(model: Any, method: str) -> Mapping[str, Any]:
    encoder = getattr(model.model, method, None)
    return inspect.signature(encoder).parameters if encoder else {}


def _video_draw(arguments: Mapping[str, Any]) -> draw.Draw:
    if "video_position_ids" in arguments:
        return draw.placed_frames
    return draw.video_patches if "video_grid_thw" in arguments else draw.frames


def _draws(arguments: Mapping[str, Any]) -> list[tuple[draw.Draw, bool]]:
    """Kinds of images that an encoder with these arguments may take, and whether a row's images are stacked."""
    if "image_position_ids" in arguments:
        return [(draw.placed_patches, False)]
    if "image_grid_thw" in arguments:
        return [(draw.patches, False)]
    if "pixel_attention_mask" in arguments:
        return [(draw.masked_tiles, True)]
    if "image_sizes" in arguments:
        return [(draw.anyres, False), (draw.any_size, False), (draw.square, False)]
    return [(draw.square, False), (draw.square, True)]
