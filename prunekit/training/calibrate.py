"""Calibration: what the strategy of a stage measures on a frozen model and some prompts, as an artefact."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from prunekit.engine.attach import Attached
from prunekit.errors import InputError, PluginError, PrunekitError, Unsupported
from prunekit.families.base import Parts
from prunekit.pipeline.build import Pipeline, build
from prunekit.pipeline.stage import Stage
from prunekit.strategy.artefact import Artefact
from prunekit.strategy.decisions import ModelShape
from prunekit.training.data import Source, encode, order
from prunekit.verify.proof import proved_parts
from prunekit.version import VERSION


def stage_of(pipeline: Pipeline, number: int | None) -> Stage:
    """The stage to calibrate: `number`, or the only one that can be. Raises InputError, Unsupported."""
    supported = [stage for stage in pipeline.stages if stage.states("calibrate")]
    if not supported:
        used = ", ".join(stage.use for stage in pipeline.stages)
        raise Unsupported(
            f"no stage of '{pipeline.name}' can be calibrated: none of {used} implements the hook `calibrate` "
            "(nothing is to be done: such strategies run without)"
        )
    if number is None and len(supported) > 1:
        raise InputError(f"several stages can be calibrated (name one with --stage: {_numbers(supported)})")
    chosen = [stage for stage in supported if number in (None, stage.index)]
    if not chosen:
        names = _numbers(supported)
        raise InputError(f"stage {number} of '{pipeline.name}' cannot be calibrated (name one of {names})")
    return chosen[0]


def calibrate(
    stage: Stage, model: Any, processor: Any, data: Source, prompts: int, *, seed: int = 0, model_id: str, name: str
) -> Artefact:
    """What the stage's strategy measures on `prompts` prompts of `data`, drawn with `seed`; the model is not changed.

    model_id: names the weights. name: of the data. Raises PluginError when the strategy fails or returns something
    that JSON cannot hold, and Unsupported for a model that cannot be pruned.
    """
    if prompts > len(data):
        raise InputError(f"'{name}' has {len(data)} prompts, not {prompts} (ask for fewer with --prompts)")
    parts = proved_parts(model)
    shape = parts.shape()
    drawn = [Prompt(model, processor, parts, data[index]) for index in order(len(data), seed, prompts)]
    result = _asked(stage, drawn, shape)
    about = {"id": model_id, "family": shape.family, "layers": shape.layers, "hidden": shape.hidden}
    used = {"name": name, "digest": data.digest, "prompts": prompts, "seed": seed}
    return Artefact(VERSION, stage.use, about, used, result)


class Prompt:
    """One prompt on a frozen model; see `prunekit.strategy.artefact.CalibrationPrompt`."""

    def __init__(self, model: Any, processor: Any, parts: Parts, sample: Any) -> None:
        self._model, self._processor, self._parts, self._sample = model, processor, parts, sample

    @property
    def visual(self) -> Tensor:
        """Which positions of the prompt hold visual tokens: bool (S,)."""
        ids = self._inputs["input_ids"][0]
        return torch.isin(ids, torch.tensor(self._parts.visual_ids, device=ids.device))

    @torch.no_grad()
    def logits(self, stages: Sequence[Mapping[str, Any]] = (), wrapper: object | None = None) -> Tensor:
        """Logits of the token after the prompt, float32 (vocabulary,), under a pipeline of `stages` or dense.

        wrapper: put around the first stage.
        """
        if not stages:
            return self._last_logits()
        pipeline = build({"name": "calibration", "stages": [dict(stage) for stage in stages]})
        if wrapper is not None:
            pipeline.stages[0].manager.register(wrapper)
        with Attached(self._model, pipeline, self._parts, processor=self._processor, observed=False):
            return self._last_logits()

    @torch.no_grad()
    def states(self) -> Sequence[Tensor]:
        """States of the dense model, float (S, H): what enters each decoder layer, and what leaves the last one."""
        states: list[Tensor] = []
        layers = self._parts.layers
        handles = [layer.register_forward_pre_hook(lambda _, args: states.append(args[0][0])) for layer in layers]
        handles.append(layers[-1].register_forward_hook(lambda _, args, output: states.append(_tensor(output)[0])))
        try:
            self._last_logits()
        finally:
            for handle in handles:
                handle.remove()
        return states

    @cached_property
    def _inputs(self) -> dict[str, Any]:
        inputs = encode(self._processor, [self._sample])
        device, dtype = self._model.device, self._model.dtype
        return {
            key: value.to(device, dtype if value.is_floating_point() else None) if isinstance(value, Tensor) else value
            for key, value in inputs.items()
        }

    def _last_logits(self) -> Tensor:
        logits: Tensor = self._model(**self._inputs, use_cache=False, logits_to_keep=1).logits[0, -1]
        return logits.float()


def _tensor(output: Any) -> Tensor:
    """The states in what a decoder layer returns: alone or first of a tuple."""
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states


def _asked(stage: Stage, prompts: Sequence[Prompt], shape: ModelShape) -> dict[str, Any]:
    who = f"{stage.label} from {stage.origin}: calibrate"
    try:
        result = stage.hook.calibrate(prompts=prompts, shape=shape)
    except PrunekitError:
        raise
    except Exception as error:
        raise PluginError(f"{who} failed with {type(error).__name__}: {error}") from error
    if not isinstance(result, Mapping):
        raise PluginError(f"{who} must return a dict, not {type(result).__name__}")
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(result), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise PluginError(f"{who} must return finite numbers, text, lists and dicts: {error}") from error
    return plain


def _numbers(stages: Sequence[Stage]) -> str:
    return ", ".join(f"{stage.index} ({stage.use})" for stage in stages)
