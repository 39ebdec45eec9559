"""What prunekit asks of the version of transformers that is installed: what things are called, and how they are called.

Whatever differs between the versions that prunekit runs on, or is no documented API, is known here and nowhere else;
`prunekit.probes` looks whether it is still as prunekit needs it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import transformers
from transformers import cache_utils
from transformers.models.auto import processing_auto
from transformers.models.llama import modeling_llama

# The versions that the matrix of tests runs on, as pyproject.toml declares them.
TESTED = ">=5.4,<5.25"

# What decoders and their layers call the KV cache that they are given, and models the one that they return.
_NAMES_OF_CACHE = ("cache", "past_key_values")  # the newer, since transformers 5.24, first
_TAKEN = inspect.signature(modeling_llama.LlamaDecoderLayer.forward).parameters
CACHE = next((name for name in _NAMES_OF_CACHE if name in _TAKEN), _NAMES_OF_CACHE[0])
_OTHER = next(name for name in _NAMES_OF_CACHE if name != CACHE)


def _recurrent() -> Any:
    linear = getattr(cache_utils, "LinearAttentionLayer", None)
    known = linear is not None and "number_of_states" in inspect.signature(linear).parameters
    return linear if known else None


# What a cache holds for layers with a recurrent state; None before transformers 5.14, whose caches hold it in another
# form, or models in caches of their own.
RECURRENT_LAYER = _recurrent()
# What layers are called with to hand keys and values on to later ones, and to take them. Before transformers 5.6 they
# do it through the cache, and are refused.
SHARED_KV = "shared_kv_states"
# Layers of a cache that hold nothing, of decoder layers that read what others hold.
EMPTY_LAYERS: tuple[type, ...] = (cache_utils.DummyLayer,) if hasattr(cache_utils, "DummyLayer") else ()


# Which hidden states of the tower are used, in configs and calls; in ViP-LLaVA the second before transformers 5.23.
NAMES_OF_FEATURE_LAYERS = ("vision_feature_layer", "vision_feature_layers")


def feature_layers(config: Any) -> Any:
    """The number of the hidden state of the vision tower that a model uses, or of several; -1 where its config is
    silent.
    """
    return next((getattr(config, name) for name in NAMES_OF_FEATURE_LAYERS if hasattr(config, name)), -1)


class Encoder:
    """A method of a model that encodes images or videos, by the names of the model's own call.

    pixels: that of the pixels, which before transformers 5.18 is `pixel_values` in methods for videos of some models.
    """

    def __init__(self, method: Callable[..., Any], pixels: str) -> None:
        self.method, self._pixels, self._signature = method, pixels, inspect.signature(method)
        taken = self._signature.parameters
        self._own = "pixel_values" if pixels not in taken and "pixel_values" in taken else pixels

    def arguments(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """What it was called with, by name."""
        given = self._signature.bind_partial(*args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        return {self._pixels if name == self._own else name: value for name, value in given.items()}

    def takes(self, name: str) -> bool:
        """Whether it has an argument of that name."""
        return name == self._pixels or name in self._signature.parameters

    def __call__(self, arguments: Mapping[str, Any]) -> Any:
        """What it returns for these arguments by name."""
        return self.method(**{self._own if name == self._pixels else name: value for name, value in arguments.items()})


def stacks_videos() -> bool:
    """Whether Gemma 4 takes videos (videos, frames, ...), as before transformers 5.21, and not frame by frame."""
    from transformers.models.gemma4.modeling_gemma4 import Gemma4Model  # not there in transformers 5.4

    return "num_frames_per_video" not in inspect.signature(Gemma4Model.get_video_features).parameters


def newline_later(base: Any) -> bool:
    """Whether the base model of LLaVA-OneVision puts the newline behind a video when it has encoded it, as before
    transformers 5.18, and not while it does.
    """
    return "pixel_values" in inspect.signature(type(base).get_video_features).parameters


def todays_names(arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    """`arguments` of a model's call with the KV cache under `CACHE`, whichever of its names the caller used."""
    if _OTHER not in arguments:
        return arguments
    return {CACHE if name == _OTHER else name: value for name, value in arguments.items()}


def image_options(model_type: str) -> Mapping[str, Any]:
    """How the processor of a model lets its images be prepared, where that is not what the image processor does by
    itself; empty where it says nothing.
    """
    auto: Any = processing_auto
    name = auto.PROCESSOR_MAPPING_NAMES.get(model_type)
    if name is None:
        return {}
    processor = getattr(transformers, name)
    own = vars(processor).get("images_kwargs")  # since transformers 5.24; before, beside the class
    beside = vars(sys.modules[processor.__module__]).get(f"{name}Kwargs")
    options: Mapping[str, Any] = getattr(beside, "_defaults", {}).get("images_kwargs", {}) if own is None else own
    return options
