"""Decoding: new tokens on the KV that the prefill has left, layer by layer. Only Python counts here, so it is short."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import is_not
from typing import Any

from torch import Tensor

from prunekit.engine.cache.ragged import RUNS, RaggedLayer
from prunekit.engine.cache.recurrent import RecurrentLayer
from prunekit.engine.decoder.forward_pass import ForwardPass
from prunekit.engine.decoder.layer_call import LayerCall, run_action, run_groups
from prunekit.engine.tokens.layout import select_rows
from prunekit.upstream import CACHE

_PER_TOKEN = ("attention_mask", "position_embeddings", "position_ids")


def passing(cache: Any) -> frozenset[int]:
    """Layers of a prefilled cache that hold all tokens, and that decoding simply runs; the first is never among them,
    as it begins the pass. None instead of a cache: none.
    """
    layers: list[RaggedLayer | RecurrentLayer] = [] if cache is None else cache.layers
    return frozenset(
        number for number, one in enumerate(layers) if number and one.layout is None and one.actions in RUNS
    )


@dataclass(eq=False)
class Decoding(ForwardPass):
    """A pass of new tokens after the prompt. What it does with a layer stands on that layer's KV."""

    is_prefill = False

    def __post_init__(self) -> None:
        self.withholds_positions = not self.gives_positions
        self.before: tuple[tuple[object, ...], dict[str, Any]] = (), {}  # what a layer was given, and its changes

    def run_layer(self, number: int, original: Callable[..., Any], hidden: Tensor, kwargs: dict[str, Any]) -> Any:
        cache = kwargs[CACHE]
        store: RaggedLayer | RecurrentLayer = cache.layers[number]
        if number == 0:  # masks and positions have been made from what had passed before
            self._begin(cache.layers, kwargs)
        actions, layout = store.actions, store.layout
        if actions in RUNS and layout is None:
            return original(hidden, **kwargs)
        if actions in RUNS and layout is not None:
            if layout.plain and kwargs.get("attention_mask") is None:  # the commonest case of `LayerCall.changes`
                if self.withholds_positions:
                    kwargs["position_ids"] = None
                return original(hidden, **kwargs)
            of = layout, *map(kwargs.get, _PER_TOKEN)
            if not self.before[0] or any(map(is_not, of, self.before[0])):  # mostly it is what the last layer was given
                call = LayerCall(self, number, original, hidden, kwargs, layout, (), None, cache)
                self.before = of, self._changes(call)
            kwargs.update(self.before[1])
            return original(hidden, **kwargs)
        call = LayerCall(self, number, original, hidden, kwargs, layout, range(len(hidden)), None, cache)
        if not isinstance(actions, tuple):
            return run_action(actions, call)
        if isinstance(store, RaggedLayer) and store.runs_stored and store.rows and not call.has_more:
            return self._run_stored(call, self.state.index(store.rows), store)
        return run_groups(call, actions, store)

    def _begin(self, layers: Sequence[RaggedLayer | RecurrentLayer], kwargs: Mapping[str, Any]) -> None:
        """Count the new tokens, and say which layers are simply run: where all are given the same mask, and that is
        none, also those that hold fewer tokens.
        """
        for each in layers:
            each.open(self.tokens)
        if self.state.alike and kwargs.get("attention_mask") is None and not self.withholds_positions:
            self.passing = {
                number for number, one in enumerate(layers)
                if one.actions in RUNS and (one.layout is None or one.layout.plain)
            }  # fmt: skip

    def _run_stored(self, call: LayerCall, rows: Tensor, store: RaggedLayer) -> Tensor:
        """Run a layer for the rows that it stores, while the others skip it: what `run_groups` does in this case."""
        if call.kwargs.get("attention_mask") is None and (call.layout is None or call.layout.plain):
            changes = self._of_rows(call.kwargs, rows)
        else:
            changes = self._changes(replace(call, who=(), rows=rows, cache=store))
        output = call.original(select_rows(call.hidden, rows), **{**call.kwargs, **changes, CACHE: store})
        states = output[0] if isinstance(output, tuple) else output
        return call.hidden.index_copy(0, rows.to(states.device), states)

    def _of_rows(self, kwargs: Mapping[str, Any], rows: Tensor) -> dict[str, Any]:
        """What `LayerCall.changes` says where no mask is needed and positions stay as they are."""
        rotary, ids = kwargs.get("position_embeddings"), kwargs.get("position_ids")
        changes = {} if rotary is None else {"position_embeddings": self.rotations.local(rotary, None, rows, False)}
        if ids is not None:
            changes["position_ids"] = None if self.withholds_positions else select_rows(ids, rows, ids.ndim - 2)
        return changes

    def _changes(self, call: LayerCall) -> dict[str, Any]:
        """`call.changes()`: layers that share a layout and rows share what differs from the complete sequence's."""
        of = call.layout, call.rows, *map(call.kwargs.get, _PER_TOKEN)
        changes: dict[str, Any] = self.once(of, call.changes)
        return changes
