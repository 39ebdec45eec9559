"""Images that the vision tower has seen for another pipeline are given as features, where that changes nothing.

It changes nothing for a pipeline that neither cuts nor reads the tower, nor resizes images: transformers' `generate`
hands features to the model in just this way once it has encoded the pixels. What was recorded of the tower, such as its
FLOPs, stands on the features.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from prunekit_evals.run.prompts import Prompt

ENCODED = "mm_encoder_outputs"
HEAVY = ("hidden_states", "attentions")  # of every block of the tower, which the decoder is not given


@dataclass(frozen=True)
class Seen:
    """Features of the images of one batch. seconds: that the tower took."""

    output: Any
    seconds: float

    @property
    def size(self) -> int:
        """In bytes, with the pixels that are recorded with them."""
        tensors = [value for value in self.output.values() if isinstance(value, torch.Tensor)]
        return 2 * sum(tensor.numel() * tensor.element_size() for tensor in tensors)


Keep = Callable[[Sequence[Prompt], Callable[[], Seen]], Seen]


def with_features(
    model: Any, inputs: Mapping[str, Any], prompts: Sequence[Prompt], keep: Keep, clock: Callable[[], float]
) -> tuple[dict[str, Any], float]:
    """The inputs with features in place of pixels, and the seconds that the tower took for them; inputs without images,
    and those of a model that takes no features, as they are.

    keep: gives what is there already, or takes what is made. To be called where the model is to run.
    """
    encode = getattr(model.base_model, "get_image_features", None)
    takes = ENCODED in inspect.signature(model.base_model.forward).parameters
    if encode is None or not takes or "pixel_values" not in inputs or "pixel_values_videos" in inputs:
        return dict(inputs), 0.0
    names = [name for name in inspect.signature(encode).parameters if name in inputs]

    def make() -> Seen:
        begun = clock()
        output = encode(**{name: inputs[name] for name in names}, return_dict=True)
        return Seen(_light(output), clock() - begun)

    seen = keep(prompts, make)
    rest = {name: value for name, value in inputs.items() if name not in names}
    return {**rest, ENCODED: {"image": seen.output}}, seen.seconds


def _light(output: Any) -> Any:
    """Without what nobody is given; what was recorded on it stays."""
    light = type(output)(**{name: value for name, value in output.items() if name not in HEAVY})
    for name, value in vars(output).items():
        if name not in HEAVY and name not in light:
            setattr(light, name, value)
    return light
