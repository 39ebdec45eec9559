"""Asking a token stage: its hooks are called with what they name, and their answers are checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from prunekit.engine.decoder.view import View
from prunekit.errors import PluginError, PrunekitError
from prunekit.pipeline.stage import Stage
from prunekit.strategy.decisions import Selection
from prunekit.strategy.declare import HOOKS


def decide(stage: Stage, view: View) -> Selection:
    """What the stage keeps of the visual tokens in `view`, with shapes (B, V) as there.

    Hooks run without gradients, unless the strategy says that it is `trainable`.
    """
    with torch.set_grad_enabled(torch.is_grad_enabled() and stage.trainable):
        if not stage.per_sample:
            return _decide(stage, view.valid, lambda name: getattr(view, name))
        found = {b: _decide_one(stage, view, b) for b, length in enumerate(view.counts) if length}
        return _together(stage, view, found)


def _decide_one(stage: Stage, view: View, b: int) -> Selection:
    return _decide(stage, view.valid[b, : view.counts[b]], lambda name: view.of_sample(name, b))


def _together(stage: Stage, view: View, found: dict[int, Selection]) -> Selection:
    """Selections of single samples as one of the batch."""
    keep = torch.zeros_like(view.valid)
    for b, one in found.items():
        keep[b, : view.counts[b]] = one.keep
    crops = {one.crop for one in found.values()}
    if len(crops) > 1:
        raise PluginError(f"{stage.label}: `crop` must be the same for all samples of a batch")
    weights = [one.weights for one in found.values() if one.weights is not None]
    whole = sizes = None
    if weights:
        width = keep.shape[1]
        extras = max(one.shape[1] - one.shape[0] for one in weights)
        blank = torch.eye(width, width + extras, dtype=weights[0].dtype, device=weights[0].device)
        rows = [_padded(found.get(b), blank) for b in range(len(keep))]
        whole = torch.stack(rows)
    if any(one.sizes is not None for one in found.values()):
        sizes = view.sizes.clone()
        for b, one in found.items():
            if one.sizes is not None:
                sizes[b, : view.counts[b]] = one.sizes.to(sizes)
    return Selection(keep, whole, sizes, crops.pop() if crops else False)


def _padded(one: Selection | None, blank: Tensor) -> Tensor:
    """One sample's weights (v, v + E) in the batch's (V, V + E); `blank` leaves every token as it is."""
    if one is None or one.weights is None:
        return blank
    weights, width = one.weights, blank.shape[0]
    many, extras = len(weights), weights.shape[1] - len(weights)
    top = torch.cat([weights[:, :many], blank[:many, many:width], weights[:, many:]], dim=1)
    top = torch.cat([top, top.new_zeros(many, blank.shape[1] - width - extras)], dim=1)
    return torch.cat([top, blank[many:]])


def _decide(stage: Stage, valid: Tensor, get: Callable[[str], Any]) -> Selection:
    extra: dict[str, Any] = {}
    if "scores" in stage.requests("select_tokens"):
        extra["scores"] = checked(stage, "score_tokens", call(stage, "score_tokens", get, extra), valid.shape)
    answer = call(stage, "select_tokens", get, extra)
    selection = answer if isinstance(answer, Selection) else Selection(answer)
    keep = checked(stage, "select_tokens", selection.keep, valid.shape)
    if keep.dtype != torch.bool:
        raise PluginError(f"{stage.label}: select_tokens must return bool, not {keep.dtype}")
    keep = keep.to(valid.device) & valid
    weights, sizes = selection.weights, selection.sizes
    if weights is None and stage.hook.merge_tokens.get_hookimpls():
        weights = call(stage, "merge_tokens", get, {"keep": keep})
    if weights is not None:
        extras = _extras(stage, get)
        weights = checked(stage, "merge_tokens", weights, (*valid.shape, valid.shape[-1] + extras))
    if sizes is not None:
        checked(stage, "select_tokens (sizes)", sizes, valid.shape)
    return Selection(keep, weights, sizes, selection.crop)


def _extras(stage: Stage, get: Callable[[str], Any]) -> int:
    """How many declared extras stand after the visual tokens."""
    return int(get("extras").shape[-2]) if stage.extras else 0


def call(stage: Stage, hook: str, get: Callable[[str], Any], extra: dict[str, Any]) -> Any:
    """Call one hook with the arguments that somebody on the stage names; the others are None and never computed."""
    wanted = stage.requests(hook)
    arguments = {name: extra[name] if name in extra else get(name) if name in wanted else None for name in HOOKS[hook]}
    try:
        return getattr(stage.hook, hook)(**arguments)
    except PrunekitError:
        raise
    except Exception as error:
        raise PluginError(f"{stage.label}: {hook} failed with {type(error).__name__}: {error}") from error


def checked(stage: Stage, hook: str, value: Any, shape: Sequence[int]) -> Tensor:
    """`value`, if it is a tensor of this shape; raises PluginError naming the stage and hook if not."""
    if not isinstance(value, Tensor) or tuple(value.shape) != tuple(shape):
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise PluginError(f"{stage.label}: {hook} must return a tensor of shape {tuple(shape)}, not {got}")
    return value
