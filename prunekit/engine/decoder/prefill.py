"""The prefill of a prompt batch: what happens around and in each decoder layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from prunekit.engine.cache import ragged, static
from prunekit.engine.cache.recurrent import RecurrentLayer
from prunekit.engine.cache.shared import seen_of
from prunekit.engine.decoder.cutting import Cutter
from prunekit.engine.decoder.forward_pass import ForwardPass, Here
from prunekit.engine.decoder.layer_call import LayerCall, run_action, run_groups
from prunekit.engine.decoder.mid import MidCuts
from prunekit.engine.decoder.readings import Needs, Readings
from prunekit.engine.tokens.layout import Layout
from prunekit.errors import Unsupported
from prunekit.pipeline.cut import Cut
from prunekit.pipeline.cuts import CAN_BE_CUT
from prunekit.strategy.decisions import LayerAction
from prunekit.strategy.sites import ENCODER, PREFILL_END, Site
from prunekit.upstream import CACHE


@cache
def _sites(number: int) -> tuple[Site, Site, Site]:
    """Before, inside and after a decoder layer."""
    return Site(number), Site(number, "layer", "mid"), Site(number, "layer", "after")


@dataclass(eq=False, kw_only=True)
class Prefill(ForwardPass):
    """The pass that sees the whole prompt: tokens leave around its layers.

    needs: what the stages of the pipeline read.
    """

    needs: Needs
    readings: Readings = field(init=False)
    cutter: Cutter = field(init=False)

    is_prefill = True

    def __post_init__(self) -> None:
        self.readings = Readings(self.state, self.needs)
        self.cutter = Cutter(self.state, self.readings)

    def run_layer(self, number: int, original: Callable[..., Any], hidden: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        state, logical, until = self.state, hidden, self.state.parts.logical_until
        cache: Cache | None = kwargs.get(CACHE)
        if number == 0:
            self._begin(hidden, cache)
        kwargs = self._cut_mask(kwargs)
        if 0 < number <= until and state.layout is not None:
            hidden = state.layout.gather(hidden)
        here, (before, _, after) = Here(self, number, kwargs), _sites(number)
        if number == 0:
            hidden = self.cutter.at(ENCODER, self.cutter.leave_tower(hidden), here)
        hidden = self.cutter.at(before, hidden, here)
        if number == state.last_only:
            hidden = hidden[:, -state.wanted :]
        state.count_entering()
        with self.readings.recording(here, hidden):
            hidden = self._act(here, original, hidden, cache)
        state.count_leaving(number)
        hidden = self.cutter.at(after, hidden, here)
        if number < until and state.layout is not None:
            return state.layout.put(hidden, logical)
        return hidden

    def _begin(self, hidden: Tensor, cache: Cache | None) -> None:
        self.readings.begin(hidden)
        if cache is not None:
            fixed = static.layers_for(cache, self.tokens) if static.takes(cache) else None
            ragged.adopt(cache, fixed or self._stores(cache), self.state)

    def _stores(self, cache: Cache) -> list[ragged.RaggedLayer | RecurrentLayer]:
        """A layer of ours for each of the cache's: keys and values, or a state."""
        parts = self.state.parts
        recurrent = [number for number in range(len(parts.layers)) if not parts.attends(number)]
        if recurrent and len(cache.layers) < len(parts.layers):
            raise Unsupported(
                "this cache does not know which layers hold a recurrent state; leave it out, or make it with "
                "DynamicCache(config=model.config)"
            )
        return [
            RecurrentLayer(cache.layers[number]) if number in recurrent else ragged.RaggedLayer()
            for number in range(len(parts.layers))
        ]

    def end(self, hidden: Tensor, cache: Cache | None) -> None:
        """What happens after the last layer: nothing to the states, but the KV cache loses what was cropped."""
        self.cutter.at(PREFILL_END, hidden, Here(self, len(self.state.parts.layers), {}))
        self.readings.finish()
        self.state.finish()
        if cache is not None:
            self.cutter.crop(cache)
            self._settle(cache)

    def _settle(self, cache: Cache) -> None:
        """Say which of their sources' entries in the KV cache readers see, now that nothing leaves it any more."""
        same: dict[tuple[Any, ...], Layout | None] = {}
        for number, source in enumerate(self.state.parts.kv_sources):
            reader, held, alive = cache.layers[number], cache.layers[source], self.layouts[number]
            assert isinstance(reader, ragged.RaggedLayer) and isinstance(held, ragged.RaggedLayer)
            if reader is held or reader.rows == ():
                continue
            alive = None if alive is self.layouts[source] else alive
            key = source, id(alive), reader.rows
            if key not in same:
                same[key] = seen_of(held, reader, alive, self.state.prompt.ids)
            reader.layout = same[key]

    def _cut_mask(self, kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        """Masks for caches of fixed size have columns for later tokens, which a prefill does not see."""
        mask = kwargs.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.ndim != 4 or mask.shape[-1] == self.tokens:
            return kwargs
        return {**kwargs, "attention_mask": self.once((mask, "cut"), lambda: mask[..., : self.tokens])}

    def _act(self, here: Here, original: Callable[..., Any], hidden: Tensor, cache: Cache | None) -> Tensor:
        """Run the layer, or do what was decided in place of that."""
        state, number = self.state, here.number
        actions, decoding = state.actions(number), state.decoding(number)
        self.layouts[number] = state.layout
        layout = self.localised(state.layout, here.kwargs)
        store: ragged.RaggedLayer | RecurrentLayer | None = None
        if cache is not None:
            layer: Any = cache.layers[number]
            assert isinstance(layer, ragged.RaggedLayer | RecurrentLayer)
            store = layer
            store.begin(self._held(layout, actions, decoding), decoding)
            store.open(self.tokens)
        asking = self._asking(number, hidden.shape[1])
        if asking is not None and layout is None:
            layout = self.full
        who = range(len(hidden))
        call = LayerCall(self, number, original, hidden, here.kwargs, layout, who, None, cache, state.layout, asking)
        mid = [cut for cut in state.bound.cuts if cut.site == _sites(number)[1]]
        if mid and state.has_visual:
            return self._run_with_cuts(mid, here, actions, call)
        if len(set(actions)) > 1 or (store is not None and store.rows not in (None, ())):
            return run_groups(call, actions, store)
        return run_action(actions[0], call)

    def _asking(self, number: int, tokens: int) -> tuple[Layout, Tensor] | None:
        """The last tokens, where layer `number` runs for so many of them alone, and their slots."""
        if self.state.last_only is None or number < self.state.last_only:
            return None
        layout = self.state.layout or self.full

        def make() -> tuple[Layout, Tensor]:
            slots = torch.arange(layout.width, device=layout.index.device)[-tokens:].expand(len(layout.index), -1)
            return layout.last(tokens), slots

        last: tuple[Layout, Tensor] = self.once((layout, "last"), make)
        return last

    @property
    def full(self) -> Layout:
        """All tokens of the prompt; the same for all layers."""
        whole: Layout = self.once((self.state, "full"), lambda: Layout.full(self.state.prompt.ids))
        return whole

    def _run_with_cuts(
        self, cuts: Sequence[Cut], here: Here, actions: Sequence[LayerAction], call: LayerCall
    ) -> Tensor:
        """Raises Unsupported when rows differ in what they do with the layer."""
        if not set(actions) <= set(CAN_BE_CUT):
            raise Unsupported(
                f"a stage cuts inside layer {here.number}, which does not simply run for every sample; move the cut"
            )
        self.mid = mid = MidCuts([partial(self.cutter.cut, cut, here=here) for cut in cuts])
        try:
            return mid.leave(run_action(actions[0], call))
        finally:
            self.mid = None

    def _held(
        self, layout: Layout | None, actions: Sequence[LayerAction], decoding: Sequence[LayerAction]
    ) -> Layout | None:
        """What the layer's KV will hold of the prompt, for the rows that decoding reads."""
        if actions == decoding and len(set(actions)) == 1:
            return layout
        rows = [row for row, action in enumerate(decoding) if action.writes_kv]
        missing = [row for row in rows if not actions[row].writes_kv]
        if not rows or (not missing and len(rows) == len(actions)):
            return layout
        if not missing and layout is None:
            return None
        layout = layout or Layout.full(self.state.prompt.ids)
        if len(missing) == len(actions):
            return Layout(layout.index[:, :0], None, layout.length, shift=layout.shift)
        if missing:
            written = torch.tensor([action.writes_kv for action in actions], device=layout.index.device)
            layout = Layout(layout.index, layout.present & written[:, None], layout.length, layout.sizes, layout.shift)
        return layout.select(self.state.index(rows)) if len(rows) < len(actions) else layout
