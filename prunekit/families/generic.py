"""A model of no known family: recognised by what it has, or refused with what it lacks.

There is no list of models here. What looks right is only believed after `prunekit.verify.proof` has run a shrunken copy
of the model against the masked reference.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel

from prunekit.errors import Unsupported
from prunekit.families.base import Modality, Parts
from prunekit.families.decoders import decoder
from prunekit.families.grids import by_arguments

METHOD, VIDEO_METHOD = "get_image_features", "get_video_features"
# Modules through which decoder layers attend to something beside the prompt, unless they stand before the decoder.
CROSSES = re.compile(r"cross_?att|gated_cross")
BEFORE = re.compile(r"vision|visual|projector|qformer|perceiver|resampler")
# What a stack of decoder layers may stand in: a causal language model, a model with a head of its own.
INSIDE = ("model", "decoder", "language_model", "text_model")


def recognise(model: PreTrainedModel) -> Parts:
    """The parts of `model`, which may live on the meta device, as they look; nothing has been proved.

    Raises Unsupported that says what is missing.
    """
    try:
        return _parts(model)
    except Unsupported as reason:
        raise Unsupported(
            f"models of type '{model.config.model_type}' ({type(model).__name__}) have no family file, and this one is "
            f"no LVLM that can be pruned without one: {reason}. What has a file, and how to write one: docs/families.md"
        ) from None


def _parts(model: PreTrainedModel) -> Parts:
    config: Any = model.config
    base, text = base_of(model), decoder_of(model)
    image = _checked(model, base)
    if text is None or not any(module is text for module in base.modules()):
        raise Unsupported("its `get_decoder` gives no stack of layers that stands in its base model")
    stack = decoder(text)
    modalities = [Modality("image", METHOD, "pixel_values", (image,), by_arguments("image", config))]
    if callable(getattr(base, VIDEO_METHOD, None)):
        ids = (token_of(config, "video") or image,)
        coords = by_arguments("video", config)
        modalities.append(Modality("video", VIDEO_METHOD, "pixel_values_videos", ids, coords))
    return Parts(family=f"generic:{config.model_type}", base=base, modalities=tuple(modalities), **stack)


def base_of(model: PreTrainedModel) -> Any:
    """The module that receives `input_ids` and encodes images: the base model, or the model itself."""
    base = getattr(model, "model", None)
    return base if isinstance(base, nn.Module) and (hasattr(base, METHOD) or not hasattr(model, METHOD)) else model


def decoder_of(model: PreTrainedModel) -> Any:
    """The stack of decoder layers, however deep it stands in what `get_decoder` gives; None where there is none.

    It may call its layers something else than `layers`.
    """
    live: Any = model
    text = live.get_decoder() if hasattr(live, "get_decoder") else None
    while isinstance(text, nn.Module) and not hasattr(text, "layers"):
        inner = next((getattr(text, name) for name in INSIDE if hasattr(text, name)), None)
        if inner is None:
            break
        text = inner
    return text if isinstance(text, nn.Module) and text is not live and text is not base_of(model) else None


def _checked(live: Any, base: Any) -> int:
    """The id of image tokens. Raises Unsupported unless `live` has what a plain LVLM has, beside its decoder."""
    takes, image = inspect.signature(live.forward).parameters, token_of(live.config, "image")
    if getattr(live.config, "is_encoder_decoder", False):
        raise Unsupported(
            "it is an encoder-decoder: its decoder attends to what an encoder made of the images, and its own prompt "
            "holds no visual tokens"
        )
    if _crosses(live):
        raise Unsupported(
            "images enter its decoder by cross-attention, in layers of their own, so that the prompt holds no visual "
            "tokens that could leave"
        )
    if not isinstance(live, GenerationMixin):
        raise Unsupported("it does not write text token by token with transformers' `generate` (no GenerationMixin)")
    if "pixel_values" not in takes:
        raise Unsupported("it takes no images: its forward has no `pixel_values`")
    if not callable(getattr(base, METHOD, None)):
        raise Unsupported(
            f"neither it nor its base model has `{METHOD}`, by which transformers encodes the images whose features "
            "stand in the prompt"
        )
    if image is None:
        raise Unsupported(
            "its config names no `image_token_id`, the token of the prompt in whose place image features stand, so "
            "that its visual tokens cannot be found"
        )
    return image


def _crosses(live: Any) -> bool:
    """Whether decoder layers attend to something beside the prompt."""
    text = live.config.get_text_config()
    if getattr(text, "cross_attention_layers", None) or getattr(text, "add_cross_attention", False):
        return True
    stack = live.get_decoder() if hasattr(live, "get_decoder") else None
    names = [name.lower() for name, _ in stack.named_modules()] if isinstance(stack, nn.Module) else []
    return any(CROSSES.search(name) and not BEFORE.search(name) for name in names)


def token_of(config: Any, kind: str) -> int | None:
    """The id of the tokens in whose place features of one kind, `image` or `video`, stand; None where none is named."""
    words = getattr(config, "vocabulary_map", None) or {}  # of models whose images become words of a codebook
    named = (getattr(config, f"{kind}_token_id", None), getattr(config, f"{kind}_token_index", None))
    return next((value for value in (*named, words.get(f"<{kind}>")) if isinstance(value, int)), None)


def no_coords(arguments: Mapping[str, Any], counts: Sequence[int]) -> list[Tensor]:
    """In the place of `Modality.coords`, of a model whose visual tokens are not where its config lets expect them."""
    raise Unsupported(
        "where visual tokens are in their images is not known of this model, which has no family file; strategies that "
        "ask for `coords` or `frames` cannot run on it"
    )
