"""Decoding: new tokens on the KV that the prefill has left, layer by layer. Only Python counts here, so it is short."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from prunekit.engine.cache.ragged import RaggedLayer
from prunekit.engine.decoder.forward_pass import ForwardPass
from prunekit.engine.decoder.layer_call import LayerCall, run_action, run_groups
from prunekit.strategy.decisions import LayerAction

# What decoding does as if the layer simply ran: there are no visual tokens to freeze among the new ones.
_RUNS = (LayerAction.RUN, LayerAction.FREEZE)


@dataclass(eq=False)
class Decoding(ForwardPass):
    """A pass of new tokens after the prompt. What it does with a layer stands on that layer's KV."""

    is_prefill = False

    def run_layer(self, number: int, original: Callable[..., Any], hidden: Tensor, kwargs: Mapping[str, Any]) -> Any:
        store: RaggedLayer = kwargs["past_key_values"].layers[number]
        store.open(self.tokens)
        actions, layout = store.actions, store.layout
        if actions in _RUNS and layout is None:
            return original(hidden, **kwargs)
        if actions in _RUNS:
            # Layers that share a layout share what differs from the arguments of the complete sequence.
            of = (layout, kwargs.get("attention_mask"), kwargs.get("position_embeddings"))
            changes = self.once(of, lambda: self._call(number, original, hidden, kwargs, store).changes())
            return original(hidden, **{**kwargs, **changes})
        call = self._call(number, original, hidden, kwargs, store)
        return run_groups(call, actions, store) if isinstance(actions, tuple) else run_action(actions, call)

    def _call(
        self, number: int, original: Callable[..., Any], hidden: Tensor, kwargs: Mapping[str, Any], store: RaggedLayer
    ) -> LayerCall:
        cache = kwargs["past_key_values"]
        return LayerCall(self, number, original, hidden, kwargs, store.layout, range(len(hidden)), None, cache)
