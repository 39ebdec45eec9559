"""Decoder layers called on the side: their own forward, without a cache, and without a trace in the batch's state.

A look ahead leaves the layer as soon as its attention has queries, keys and values, so that norm, projections, biases,
q- and k-norms and rotation are the family's own, and the attention itself and the MLP cost nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import Context
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.engine.attention.attended import Attended, wide
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


@torch.no_grad()
def phases(aside: Aside, hidden: Tensor, dim: int) -> Tensor:
    """The rotation of physical states (B, K, H) as vectors, float (B|1, K, R), at least float32: the product of two is
    the mean of cos(distance * frequency) over the `dim` numbers of a head. Numbers that do not rotate count as 1.
    """
    cos, sin = (wide(part) for part in _rotary(aside.arguments(hidden), "undecay=True"))
    if cos.ndim != 3:
        raise Unsupported("undecay=True is not available for this model: its rotation mixes several axes of positions")
    length = (cos.square() + sin.square()).sqrt()  # of scaled rotations it is not 1
    resting = torch.full_like(cos[..., :1], max(dim - cos.shape[-1], 0) ** 0.5)
    vectors: Tensor = torch.cat([cos / length, sin / length, resting], dim=-1) * dim**-0.5
    return vectors


@torch.no_grad()
def turns(here: Here) -> list[Tensor]:
    """The rotations of the complete sequence that the layer of `here` is given, one for each axis of position ids:
    float (B|1, S, R), in at least float32, cosines and then sines.
    """
    rotations = here.forward_pass.rotations
    # Behind the last layer no arguments are at hand: those that the first one got.
    given = here.kwargs or {"position_embeddings": rotations.made[0].rotary}
    _rotary(given, "rotary")  # refuses a layer that takes its positions some other way
    made = rotations.by_axis(given["position_embeddings"])
    both = [torch.cat(_rotary({"position_embeddings": one}, "rotary"), dim=-1) for one in made]
    return [one if one.ndim == 3 else one[0] for one in both]  # some modules leave the axes, which are alike, apart


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
    cos, sin = _rotary(arguments, "rope=False")
    rotary = arguments["position_embeddings"]
    still = (torch.ones_like(cos), torch.zeros_like(sin))
    return {"position_embeddings": torch.ones_like(rotary) if isinstance(rotary, Tensor) else still}


def _rotary(arguments: Mapping[str, Any], request: str) -> tuple[Tensor, Tensor]:
    """The rotation of each slot as (cos, sin), float (B|1, K, R) each, of all numbers of a head that rotate."""
    rotary = arguments.get("position_embeddings")
    if isinstance(rotary, Tensor) and rotary.is_complex():  # one number for each pair of them
        return torch.cat([rotary.real] * 2, dim=-1), torch.cat([rotary.imag] * 2, dim=-1)
    if not (isinstance(rotary, tuple) and len(rotary) == 2):
        raise Unsupported(
            f"{request} is not available for this model: its layers do not get their rotation as (cos, sin)"
        )
    cos, sin = rotary
    return cos, sin


def _nothing(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("only the arguments of this call are used")
