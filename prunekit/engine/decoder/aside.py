"""Decoder layers called on the side: their own forward, without a cache, and without a trace in the batch's state.

A look ahead leaves the layer as soon as its attention has queries, keys and values, so that norm, projections, biases,
q- and k-norms and rotation are the family's own, and the attention itself and the MLP cost nothing.
"""

from __future__ import annotations

from contextvars import Context
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.engine.attention.attended import Attended
from prunekit.engine.attention.tap import Aborted, Record, recorded
from prunekit.engine.decoder.forward_pass import Here
from prunekit.engine.decoder.layer_call import LayerCall
from prunekit.engine.tokens.layout import Layout
from prunekit.engine.tokens.streams import as_layers_take, tokens_first
from prunekit.errors import Unsupported
from prunekit.upstream import SHARED_KV


@dataclass(frozen=True)
class Aside:
    """How layer `number` is called on the side: as the one of `here`, on the tokens of `layout` (None: all)."""

    here: Here
    layout: Layout | None
    number: int

    def arguments(self, hidden: Tensor) -> dict[str, Any]:
        """A layer's arguments for physical states (B, K, H), without a cache."""
        current, kwargs = self.here.forward_pass, self.here.kwargs
        layout, who = current.localised(self.layout, kwargs), range(len(hidden))
        call = LayerCall(current, self.number, _nothing, hidden, kwargs, layout, who, None, None, self.layout)
        shared = {SHARED_KV: call.handed(keeps=False)} if SHARED_KV in kwargs else {}
        return call.local() | {"use_cache": False} | shared


@torch.no_grad()
def attended(aside: Aside, layer: nn.Module, attention: nn.Module, hidden: Tensor, rope: bool) -> Attended:
    """What `attention` of `layer` attends to when the layer gets physical states (B, K, H).

    rope: False takes queries and keys before rotation.
    """
    arguments = aside.arguments(hidden)
    if not rope:
        arguments |= _unrotated(arguments)
    record = Record(attention, abort=True)
    _call(layer, hidden, arguments, record)
    return record.result


def run(aside: Aside, layer: nn.Module, hidden: Tensor, attention: str | None) -> tuple[Tensor, Attended | None]:
    """Physical states (B, K, H) after `layer`, called as the layer of `aside` is.

    attention: the name of its part whose attention is recorded; None: it is not.
    """
    record = None if attention is None else Record(getattr(layer, attention))
    hidden = _call(layer, hidden, aside.arguments(hidden), record)
    return hidden, None if record is None else record.result


def _call(layer: nn.Module, hidden: Tensor, arguments: dict[str, Any], record: Record | None) -> Tensor:
    """Call a layer in an empty context, in which no override of the engine, and nobody else's, knows of the call."""

    def call() -> Any:
        if record is None:
            return layer.forward(as_layers_take(hidden), **arguments)
        try:
            with recorded(record):
                return layer.forward(as_layers_take(hidden), **arguments)
        except Aborted:
            return as_layers_take(hidden)

    output = Context().run(call)
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return tokens_first(states)


def _unrotated(arguments: dict[str, Any]) -> dict[str, Any]:
    """Rotations that rotate by nothing. Raises Unsupported where a layer takes its positions some other way."""
    rotary = arguments.get("position_embeddings")
    if isinstance(rotary, Tensor) and rotary.is_complex():
        return {"position_embeddings": torch.ones_like(rotary)}
    if not (isinstance(rotary, tuple) and len(rotary) == 2):
        raise Unsupported(
            "rope=False is not available for this model: its layers do not get their rotation as (cos, sin)"
        )
    return {"position_embeddings": (torch.ones_like(rotary[0]), torch.zeros_like(rotary[1]))}


def _nothing(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("only the arguments of this call are used")
