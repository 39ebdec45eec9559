"""Asking a stage: its hooks are called with what they name, and their answers are checked."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from prunekit.decisions import Selection
from prunekit.engine.view import View
from prunekit.errors import PluginError, PrunekitError
from prunekit.hookspecs import TokenHooks
from prunekit.pipeline import Stage

ARGUMENTS = {
    name: tuple(
        parameter for parameter in inspect.signature(getattr(TokenHooks, name)).parameters if parameter != "self"
    )
    for name in ("score_tokens", "select_tokens", "merge_tokens")
}


@torch.no_grad()
def decide(stage: Stage, view: View) -> Selection:
    """What the stage keeps of the visual tokens in `view`, with shapes (B, V) as there."""
    if not getattr(stage.strategy, "per_sample", False):
        return _decide(stage, view.valid, lambda name: getattr(view, name))
    keep = torch.zeros_like(view.valid)
    weights: Tensor | None = None
    for b, length in enumerate(view.counts):
        if length == 0:
            continue
        one = _decide(stage, view.valid[b, :length], lambda name, b=b: view.of_sample(name, b))
        keep[b, :length] = one.keep
        if one.weights is not None:
            if weights is None:
                weights = torch.eye(keep.shape[1], dtype=one.weights.dtype, device=one.weights.device)
                weights = weights.repeat(keep.shape[0], 1, 1)
            weights[b, :length, :length] = one.weights
    return Selection(keep, weights)


def _decide(stage: Stage, valid: Tensor, get: Any) -> Selection:
    extra: dict[str, Any] = {}
    if "scores" in stage.requests("select_tokens"):
        extra["scores"] = _checked(stage, "score_tokens", _call(stage, "score_tokens", get, extra), valid.shape)
    answer = _call(stage, "select_tokens", get, extra)
    selection = answer if isinstance(answer, Selection) else Selection(answer)
    keep = _checked(stage, "select_tokens", selection.keep, valid.shape)
    if keep.dtype != torch.bool:
        raise PluginError(f"{stage.label}: select_tokens must return bool, not {keep.dtype}")
    keep = keep.to(valid.device) & valid
    weights = selection.weights
    if weights is None and stage.hook.merge_tokens.get_hookimpls():
        weights = _call(stage, "merge_tokens", get, {"keep": keep})
    if weights is not None:
        weights = _checked(stage, "merge_tokens", weights, (*valid.shape, valid.shape[-1]))
    return Selection(keep, weights)


def _call(stage: Stage, hook: str, get: Any, extra: dict[str, Any]) -> Any:
    """Call one hook with the arguments that somebody on the stage names; the others are None and never computed."""
    wanted = stage.requests(hook)
    arguments = {
        name: extra[name] if name in extra else get(name) if name in wanted else None for name in ARGUMENTS[hook]
    }
    try:
        return getattr(stage.hook, hook)(**arguments)
    except PrunekitError:
        raise
    except Exception as error:
        raise PluginError(f"{stage.label}: {hook} failed with {type(error).__name__}: {error}") from error


def _checked(stage: Stage, hook: str, value: Any, shape: tuple[int, ...]) -> Tensor:
    if not isinstance(value, Tensor) or tuple(value.shape) != tuple(shape):
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise PluginError(f"{stage.label}: {hook} must return a tensor of shape {tuple(shape)}, not {got}")
    return value
