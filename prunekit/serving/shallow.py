"""A checkpoint without the layers that a pipeline always skips, which any engine serves.

The decoder's layers close up, and its config says how many there are. What was written is proved at once: the shallower
model answers as the whole one does under the pipeline.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunekit import families
from prunekit.apply import apply
from prunekit.errors import InputError, Unsupported
from prunekit.families.base import Parts
from prunekit.pipeline.bound import BoundPipeline
from prunekit.pipeline.build import Pipeline, build
from prunekit.spec.compose import Source
from prunekit.strategy.decisions import LayerAction
from prunekit.version import VERSION

RECORD = "prunekit.json"
ROUNDING = 64  # of the dtype's own steps, that sums in another order may differ by


@dataclass(frozen=True, eq=False)
class Shallow:
    """A shallower model. kept: numbers of the decoder layers that it has, in the whole model.

    error: the largest difference of a logit to the whole model under the pipeline, over the largest logit.
    """

    model: Any
    pipeline: str
    resolved: str
    sha: str
    kept: tuple[int, ...]
    layers: int
    error: float

    def save(self, folder: Path, processor: Any) -> None:
        """Write a checkpoint with safetensors, processor and a record of where it is from.

        Raises InputError for a folder that is not empty, or that cannot be written.
        """
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"'{folder}' is there and not empty (name another folder)")
        record = {
            "pipeline": self.pipeline, "sha": self.sha, "resolved": self.resolved, "layers": self.layers,
            "kept": list(self.kept), "error": self.error, "prunekit": VERSION,
        }  # fmt: skip
        try:
            self.model.save_pretrained(folder)
            processor.save_pretrained(folder)
            (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            reason = error.strerror or error
            raise InputError(f"'{folder}' cannot be written: {reason} (name another folder)") from error


def shallow(model: Any, pipeline: Pipeline | Source, inputs: Mapping[str, Any]) -> Shallow:
    """The model without the layers that the pipeline skips; the weights are shared with `model`.

    inputs: of a model call, `input_ids` and images among them, by which the result is compared with the whole model
    under the pipeline. Raises Unsupported for a pipeline that does anything else than leave out layers, and for a model
    whose config cannot say that they are gone.
    """
    built = pipeline if isinstance(pipeline, Pipeline) else build(pipeline)
    parts = families.find(model)
    bound = built.bind(families.shape_of(model))
    kept = remaining(bound)
    if kept[: parts.logical_until] != tuple(range(parts.logical_until)):
        raise Unsupported(
            f"the {parts.family} decoder adds features to hidden states behind its first {parts.logical_until} layers, "
            "by their numbers, so that a checkpoint must have these (skip later ones)"
        )
    small = _without(model, parts, kept)
    with torch.inference_mode():
        with apply(model, built):
            whole = model(**inputs).logits
        error = _difference(small(**inputs).logits, whole)
    if error > ROUNDING * torch.finfo(whole.dtype).eps:
        raise Unsupported(
            f"the model without these layers does not answer as the pipeline does (logits differ by {error:.1e} of the "
            "largest): its config says more of a layer than its number"
        )
    return Shallow(small, built.name, built.resolved, built.sha, kept, len(parts.layers), error)


def remaining(bound: BoundPipeline) -> tuple[int, ...]:
    """Layers that run. Raises Unsupported for a pipeline that does anything but skip some, and where it skips none."""
    for stage in bound.stages:
        if stage.is_router or any(cut.stage is stage for cut in bound.cuts):
            raise Unsupported(
                f"a checkpoint can leave out layers alone, and {stage.label} decides about tokens or for each sample "
                "(leave that stage out; what an engine could do with it: `prunekit doctor MODEL --serving PIPELINE`)"
            )
    plan = bound.plan
    for layer in sorted(plan.layers):
        if (plan[layer], plan.decoding(layer)) != (LayerAction.SKIP, LayerAction.SKIP):
            raise Unsupported(
                f"a checkpoint can leave out whole layers alone, in prefill and decoding; layer {layer} is "
                f"'{plan[layer].value}' in prefill and '{plan.decoding(layer).value}' in decoding"
            )
    if not plan.layers:
        raise Unsupported("the pipeline leaves out no layer, so its checkpoint is the model itself")
    return tuple(number for number in range(bound.shape.layers) if number not in plan.layers)


def _without(model: Any, parts: Parts, kept: Sequence[int]) -> Any:
    """A model of the same class whose config has fewer layers, with the weights of the others."""
    config = copy.deepcopy(model.config)
    text, layers = config.get_text_config(decoder=True), len(parts.layers)
    text.num_hidden_layers = len(kept)
    for name, value in vars(text).items():
        if isinstance(value, list | tuple) and len(value) == layers:  # what each layer is
            setattr(text, name, type(value)(value[number] for number in kept))
    (prefix,) = (name for name, module in model.named_modules() if module is parts.layers)
    number = {old: new for new, old in enumerate(kept)}
    state: dict[str, Tensor] = {}
    for name, weight in model.state_dict().items():
        head, _, rest = name.partition(f"{prefix}.")
        if head or not rest:
            state[name] = weight
            continue
        old, _, inside = rest.partition(".")
        if int(old) in number:
            state[f"{prefix}.{number[int(old)]}.{inside}"] = weight
    return _built(model, config, state)


def _built(model: Any, config: Any, state: Mapping[str, Tensor]) -> Any:
    """Raises Unsupported where a class makes other layers of the config than those that the weights are of."""
    try:
        with torch.device("meta"):
            small = type(model)(config)
        small.load_state_dict(state, strict=True, assign=True)
    except (RuntimeError, ValueError, TypeError, KeyError, IndexError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise Unsupported(
            f"a {type(model).__name__} with fewer layers cannot be made from its config: {reason}"
        ) from error
    small.tie_weights()
    _buffers(model, small)
    small.generation_config = copy.deepcopy(model.generation_config)
    return small.eval()


def _buffers(model: Any, small: Any) -> None:
    """What no checkpoint holds, such as frequencies, is as in the whole model."""
    whole = dict(model.named_buffers())
    for name, buffer in list(small.named_buffers()):
        if buffer.is_meta:
            owner, _, own = name.rpartition(".")
            module = small.get_submodule(owner)
            if name not in whole:
                raise Unsupported(f"a {type(model).__name__} with fewer layers has '{name}', which the model has not")
            module.register_buffer(own, whole[name], persistent=own not in module._non_persistent_buffers_set)


def _difference(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).abs().max() / other.double().abs().max().clamp_min(1e-300))
