"""Which forwards of a decoder are overridden for a pipeline, and with what."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container, Mapping
from typing import Any

import torch
from torch import Tensor

from prunekit.engine.cache import static
from prunekit.engine.decoder.forward_pass import CURRENT
from prunekit.engine.overrides import Overrides
from prunekit.engine.tokens import masks
from prunekit.engine.tokens.layout import take
from prunekit.engine.tokens.streams import as_layers_take, tokens_first
from prunekit.engine.tracing import STEP, as_it_is, is_compiled, untraced
from prunekit.errors import Unsupported
from prunekit.families.base import Parts
from prunekit.pipeline.bound import BoundPipeline
from prunekit.strategy.decisions import LayerAction


def override(overrides: Overrides, parts: Parts, bound: BoundPipeline, read: Container[int]) -> None:
    """Override the layers of `parts`, and of their attention, norm and MLP what `bound` needs.

    read: layers whose attention is read.
    """
    kind = masks.kind_of(parts.attention_implementation) or "bool"
    inside = {cut.site.layer for cut in bound.cuts if cut.site.in_decoder and cut.site.point == "mid"}
    for number, layer in enumerate(parts.layers):
        overrides.replace(layer, "forward", _layer_forward(number, kind), traceable=True)
        if number in inside:
            _override_mid(overrides, parts, layer)
        if number in read or is_compiled(layer):
            overrides.replace(parts.mixing(number), "forward", as_it_is)
        if _may(bound, number, LayerAction.SKIP_ATTENTION):
            overrides.replace(parts.mixing(number), "forward", _attention_forward(parts.attends(number)))
        if _may(bound, number, LayerAction.SKIP_MLP):
            mlp = getattr(layer, parts.mlp)
            experts = any(parameter.ndim > 2 for parameter in mlp.parameters())
            overrides.replace(mlp, "forward", _mlp_forward(experts))


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


def _layer_forward(number: int, kind: masks.Kind) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        parameters = inspect.signature(original).parameters.values()
        names = [one.name for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD][1:]

        def run(hidden: Tensor, **kwargs: Any) -> Any:
            return _first(original(as_layers_take(hidden), **kwargs), tokens_first)

        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if args:
                if len(args) > len(names):
                    raise Unsupported(
                        "decoder layers are called with positional arguments that have no names; this transformers "
                        "version is not supported"
                    )
                kwargs.update(zip(names, args, strict=False))
            if torch.compiler.is_dynamo_compiling():  # the cheapest test: it is made for every layer and step
                if STEP.traced:
                    return static.decode(number, original, hidden_states, kwargs, kind)
                return untraced(forward, hidden_states, **kwargs)
            current = CURRENT.get()
            if current is None or number in current.passing:
                return original(hidden_states, **kwargs)
            if hidden_states.ndim == 3:
                return current.run_layer(number, original, hidden_states, kwargs)
            return _first(current.run_layer(number, run, tokens_first(hidden_states), kwargs), as_layers_take)

        return forward

    return make


def _first(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """What a layer gave, hidden states or a tuple that begins with them, with these changed."""
    return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)


def _attention_forward(weights: bool) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The override of an attention, which returns its weights too, or of what stands in its place, which has none."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            current = CURRENT.get()
            if current is None or current.left_out is not LayerAction.SKIP_ATTENTION:
                return original(*args, **kwargs)
            zeros = torch.zeros_like(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])
            return (zeros, None) if weights else zeros

        return forward

    return make


def _mlp_forward(experts: bool) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The override of an MLP. Experts may return more than states: what, they are asked once, with one token."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        known: list[Any] = []

        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            current = CURRENT.get()
            if current is None or current.left_out is not LayerAction.SKIP_MLP:
                return original(hidden_states, *args, **kwargs)
            if experts and not known:
                more, named = _changed(lambda x: _of_tokens(x, hidden_states.shape[1], slice(1)), args, kwargs)
                known.append(original(hidden_states[:, :1], *more, **named))
            zeros = torch.zeros_like(hidden_states)
            return (zeros, *known[0][1:]) if known and isinstance(known[0], tuple) else zeros

        return forward

    return make


def _cut_norm_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """The norm before the MLP, or the MLP where none is, on the tokens that the cuts inside the layer leave."""

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        current = CURRENT.get()
        if current is None or current.mid is None:
            return original(hidden_states, *args, **kwargs)
        return original(current.mid.decide(hidden_states), *args, **kwargs)

    return forward


def _cut_mlp_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """The MLP, whose output goes back to the width of the layer."""

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        current = CURRENT.get()
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
        current = CURRENT.get()
        return original(*args, **kwargs) if current is None else current.rotations.record(original, args, kwargs)

    return forward
