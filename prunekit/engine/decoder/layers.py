"""Which forwards of a decoder are overridden for a pipeline, and with what."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from prunekit.engine.cache import static
from prunekit.engine.decoder.forward_pass import CURRENT, ForwardPass
from prunekit.engine.overrides import Overrides
from prunekit.engine.tokens import masks
from prunekit.engine.tokens.layout import take
from prunekit.errors import Unsupported
from prunekit.families.base import Parts
from prunekit.pipeline.bound import BoundPipeline
from prunekit.strategy.decisions import LayerAction


def override(overrides: Overrides, parts: Parts, bound: BoundPipeline) -> None:
    """Override the layers of `parts`, and of their attention, norm and MLP what `bound` needs."""
    kind = masks.kind_of(parts.attention_implementation) or "bool"
    inside = {cut.site.layer for cut in bound.cuts if cut.site.in_decoder and cut.site.point == "mid"}
    for number, layer in enumerate(parts.layers):
        overrides.replace(layer, "forward", _layer_forward(number, kind))
        if number in inside:
            _override_mid(overrides, parts, layer)
        if _may(bound, number, LayerAction.SKIP_ATTENTION):
            overrides.replace(getattr(layer, parts.attention), "forward", _attention_forward)
        if _may(bound, number, LayerAction.SKIP_MLP):
            overrides.replace(getattr(layer, parts.mlp), "forward", _mlp_forward)


def _may(bound: BoundPipeline, number: int, action: LayerAction) -> bool:
    """Whether a layer may do this for some sample: by the static plan, or as a router may plan.

    A router with a budget of layers skips whole ones; one that decides by itself may plan anything.
    """
    free = any(router.decides_layers and router.keep_layers is None for router in bound.routers)
    return free or action in (bound.plan[number], bound.plan.decoding(number))


def _override_mid(overrides: Overrides, parts: Parts, layer: Any) -> None:
    assert parts.mlp_norm is not None, "checked when the pipeline was bound"
    overrides.replace(getattr(layer, parts.mlp_norm), "forward", _cut_norm_forward)
    overrides.replace(getattr(layer, parts.mlp), "forward", _cut_mlp_forward)


def current_pass() -> ForwardPass | None:
    """The pass that runs in this thread; None outside of one, and in compiled decoding, which needs none."""
    # Context variables cannot be traced.
    return None if torch.compiler.is_compiling() else CURRENT.get()


def _layer_forward(number: int, kind: masks.Kind) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_dynamo_compiling():  # the cheapest test: it is made for every layer and step
                return static.decode(number, original, hidden_states, kwargs, kind)
            current = CURRENT.get()
            if current is None or number in current.passing:
                return original(hidden_states, *args, **kwargs)
            if args:
                raise Unsupported(
                    "decoder layers are called with positional arguments; this transformers version is not supported"
                )
            return current.run_layer(number, original, hidden_states, kwargs)

        return forward

    return make


def _attention_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        current = current_pass()
        if current is None or current.left_out is not LayerAction.SKIP_ATTENTION:
            return original(*args, **kwargs)
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        return torch.zeros_like(hidden), None

    return forward


def _mlp_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    known: list[Any] = []  # what it returns for one token, where experts return the states and more

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        current = current_pass()
        if current is None or current.left_out is not LayerAction.SKIP_MLP:
            return original(hidden_states, *args, **kwargs)
        if not known:
            more, named = _changed(lambda x: _of_tokens(x, hidden_states.shape[1], slice(1)), args, kwargs)
            known.append(original(hidden_states[:, :1], *more, **named))
        zeros = torch.zeros_like(hidden_states)
        return (zeros, *known[0][1:]) if isinstance(known[0], tuple) else zeros

    return forward


def _cut_norm_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """The norm before the MLP, or the MLP where none is, on the tokens that the cuts inside the layer leave."""

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        current = current_pass()
        if current is None or current.mid is None:
            return original(hidden_states, *args, **kwargs)
        return original(current.mid.decide(hidden_states), *args, **kwargs)

    return forward


def _cut_mlp_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """The MLP, whose output goes back to the width of the layer."""

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        current = current_pass()
        if current is None or current.mid is None:
            return original(hidden_states, *args, **kwargs)
        mid = current.mid
        more, named = _changed(lambda x: _of_tokens(x, mid.width, mid.slots), args, kwargs)
        output = original(hidden_states, *more, **named)
        first = output[0] if isinstance(output, tuple) else output
        whole = mid.widen(first.reshape(len(hidden_states), -1, first.shape[-1]))  # some experts give them in a row
        return (whole, *output[1:]) if isinstance(output, tuple) else whole

    return forward


def _changed(
    change: Callable[[Any], Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[list[Any], dict[str, Any]]:
    return [change(one) for one in args], {name: change(one) for name, one in kwargs.items()}


def _of_tokens(x: Any, tokens: int, slots: Tensor | slice | None) -> Any:
    """Another argument of an MLP for `slots` of the tokens that it has an entry for, (B, tokens, ...), if it has."""
    if slots is None or not isinstance(x, Tensor) or x.ndim < 2 or x.shape[1] != tokens:
        return x
    return x[:, slots] if isinstance(slots, slice) else take(x, slots, 1)


def rotary_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """An override of the decoder's rotary module: its calls are recorded, to be made again with other positions."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        current = current_pass()
        return original(*args, **kwargs) if current is None else current.rotations.record(original, args, kwargs)

    return forward
