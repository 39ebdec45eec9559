"""A tiny twin of any LVLM: the same classes, the same kinds of layers, two heads, few layers, 120 words.

It is made from the model's own class and config, so that a subclass with other parts has a twin with these parts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from prunekit import families
from prunekit.errors import PrunekitError, Unsupported
from prunekit.families.base import Parts
from prunekit.verify.guesses import guesses, rows_of
from prunekit.verify.precision import Float64Throughout
from prunekit.verify.shrink import shrunken
from prunekit.verify.tiny_models import FIRST_WORD, tiny_from_config
from prunekit.verify.tiny_prompts import Recipe, TinyBatch, tiny_batch

# Patches of a side of its images, in the order in which they are tried: merges by 2 and 4 divide 8, those by 3 divide
# 12, windows of 8 fit in 16.
SIDES = (8, 12, 16, None)


@dataclass(frozen=True)
class Twin:
    """A tiny model in float64, its parts as recognised, and a prompt batch that it runs on.

    recipe: of the prompts. kinds: the visual inputs that they hold, `image`, `video` or both.
    """

    model: Any
    parts: Parts
    inputs: TinyBatch
    recipe: Recipe
    kinds: tuple[str, ...]


def twin_of(model: PreTrainedModel) -> Twin:
    """A twin of `model`, which may live on the meta device: with small images if it runs on these, else with its own.

    Raises Unsupported when no such model can be made, or none runs on prompts that prunekit can make, with the reason.
    """
    first: Unsupported | None = None
    for side in SIDES:
        try:
            tiny = _built(model, side)
            parts = families.find(tiny)
            _check_classes(families.find(model), parts)
            return fed(tiny, parts)
        except Unsupported as reason:
            first = first or reason
    assert first is not None
    raise first


def _built(model: PreTrainedModel, side: int | None) -> Any:
    """A small model of the same class; eager where it has no sdpa. Raises Unsupported where that fails."""
    try:
        try:
            return tiny_from_config(shrunken(model.config, side), cls=type(model))
        except ValueError as error:
            if "scaled_dot_product" not in str(error):
                raise
            return tiny_from_config(shrunken(model.config, side), "eager", cls=type(model))
    except Exception as error:  # configs of unknown models fail in any way
        raise Unsupported(
            f"no tiny twin of {type(model).__name__} can be made, so that nothing can be proved about it: "
            f"{brief(error)}"
        ) from error


def _check_classes(parts: Parts, tiny: Parts) -> None:
    """Raise Unsupported where a model was changed after it was made, so that its twin has other parts."""
    if parts.opaque is not None and tiny.opaque is None:
        raise Unsupported(
            f"the decoder {type(parts.text).__name__} can be cut at its input only, since {parts.opaque}, and a model "
            "made from the config alone is another one, so that no twin can prove it"
        )
    for number, layer in enumerate(parts.layers):
        for name in ("", parts.attention, parts.mixer, parts.mlp):
            kind = _kind(layer, name)
            if kind not in {_kind(one, name) for one in tiny.layers}:
                raise Unsupported(
                    f"{name or 'decoder'} of layer {number} is a {kind.__name__}, which a model made from the config "
                    "alone does not have, so that no twin can prove it; a family file needs no twin: docs/families.md"
                )


def _kind(layer: Any, name: str | None) -> type[Any]:
    """The class of the part with this name, of the layer itself without one."""
    return type(getattr(layer, name, None) if name else layer)


def fed(model: Any, parts: Parts) -> Twin:
    """`model`, which has these parts, with a prompt batch: the first guess that it runs on.

    Raises Unsupported when it runs on none of them.
    """
    first: Exception | None = None
    for guess in guesses(model, parts):
        try:
            with torch.no_grad(), Float64Throughout():
                inputs = tiny_batch(model, guess.recipe, rows_of(guess.recipe))
                logits = model(**inputs).logits
        except PrunekitError:
            raise
        except Exception as error:  # a model that is called with something else fails in any way
            first = first or error
        else:
            if bool(logits[:, -1].isfinite().all()):
                return Twin(model, parts, inputs, guess.recipe, guess.kinds)
    words = _words_alone(model)
    if parts.opaque is not None:
        raise Unsupported(
            f"the decoder {type(parts.text).__name__} can be cut at its input only, since {parts.opaque}, and on a "
            f"tiny twin no prompt runs{words}, so that even this cannot be proved"
        ) from first
    raise Unsupported(
        f"{type(model).__name__} runs on none of the inputs that prunekit can make for it, images of every form that "
        f"it knows among them{words}, so that nothing can be proved about it"
    ) from first


def _words_alone(model: Any) -> str:
    """Whether a model fails on a prompt without images, too; empty where it runs."""
    ids = torch.arange(FIRST_WORD, FIRST_WORD + 4)[None]
    try:
        with torch.no_grad(), Float64Throughout():
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
    except Exception:  # as above
        return ", nor on words alone"
    return ""


def brief(error: Exception) -> str:
    """An error that is not ours in one short line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
