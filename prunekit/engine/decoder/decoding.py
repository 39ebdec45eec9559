"""Decoding: new tokens on the KV that the prefill has left, layer by layer. Only Python counts here, so it is short."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from prunekit.engine.cache.ragged import RaggedLayer
from prunekit.engine.cache.recurrent import RecurrentLayer
from prunekit.engine.decoder.forward_pass import ForwardPass
from prunekit.engine.decoder.layer_call import LayerCall, run_action, run_groups
from prunekit.strategy.decisions import LayerAction
from prunekit.upstream import CACHE

# What decoding does as if the layer simply ran: there are no visual tokens to freeze among the new ones.
_RUNS = (LayerAction.RUN, LayerAction.FREEZE)


def passing(cache: Any) -> frozenset[int]:
    """Layers of a prefilled cache that hold all tokens, and that decoding simply runs; the first is never among them,
    as it begins the pass. None instead of a cache: none.
    """
    layers: list[RaggedLayer | RecurrentLayer] = [] if cache is None else cache.layers
    return frozenset(
        number for number, one in enumerate(layers) if number and one.layout is None and one.actions in _RUNS
    )


@dataclass(eq=False)
class Decoding(ForwardPass):
    """A pass of new tokens after the prompt. What it does with a layer stands on that layer's KV."""

    is_prefill = False

    def run_layer(self, number: int, original: Callable[..., Any], hidden: Tensor, kwargs: dict[str, Any]) -> Any:
        cache = kwargs[CACHE]
        store: RaggedLayer | RecurrentLayer = cache.layers[number]
        if number == 0:  # masks and positions have been made from what had passed before
            for each in cache.layers:
                each.open(self.tokens)
        actions, layout = store.actions, store.layout
        if actions in _RUNS and layout is None:
            return original(hidden, **kwargs)
        if actions in _RUNS and layout is not None:
            mask, rotary, ids = (kwargs.get(name) for name in ("attention_mask", "position_embeddings", "position_ids"))
            if mask is None and layout.plain:  # what `LayerCall.changes` would say, for the commonest case
                if not self.gives_positions:
                    kwargs["position_ids"] = None
                return original(hidden, **kwargs)
            # Layers that share a layout share what differs from the arguments of the complete sequence. This is `once`
            # written out, without a closure for every layer.
            key = (id(layout), id(mask), id(rotary), id(ids))
            if key not in self._memo:
                changes = LayerCall(self, number, original, hidden, kwargs, layout, (), None, cache).changes()
                self._memo[key] = changes, (layout, mask, rotary, ids)
            kwargs.update(self._memo[key][0])
            return original(hidden, **kwargs)
        call = LayerCall(self, number, original, hidden, kwargs, layout, range(len(hidden)), None, cache)
        return run_groups(call, actions, store) if isinstance(actions, tuple) else run_action(actions, call)
