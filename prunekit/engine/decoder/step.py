"""One forward pass of the decoder: every layer on the tokens that it really has, doing what the plan says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from prunekit.engine.cache import ragged, static
from prunekit.engine.cache.stand_ins import Shares
from prunekit.engine.decoder.actions import Running, run_action
from prunekit.engine.decoder.mid import cutting
from prunekit.engine.decoder.session import Session
from prunekit.engine.decoder.view import Here
from prunekit.engine.tokens import masks
from prunekit.engine.tokens.layout import Layout, select_rows
from prunekit.engine.tokens.positions import Rotations
from prunekit.strategy.decisions import LayerAction


@dataclass
class Step:
    """One forward pass of the decoder: the prefill of a session, or new tokens on its cache.

    tokens: logical tokens that pass. kind: of the attention masks.
    """

    session: Session
    prefill: bool
    tokens: int
    kind: masks.Kind
    rotations: Rotations = field(default_factory=Rotations)
    memo: dict[tuple[int, ...], tuple[Any, object]] = field(default_factory=dict)

    def run_layer(self, number: int, original: Any, hidden: Tensor, kwargs: Mapping[str, Any]) -> Any:
        """Do what the session decided for layer `number`: cut tokens around it, skip it, or run it on what is left."""
        if self.prefill:
            return self._prefill(number, original, hidden, kwargs)
        store = kwargs["past_key_values"].layers[number]
        assert isinstance(store, ragged.RaggedLayer)
        actions = store.actions
        if isinstance(actions, tuple):
            return self._groups(number, actions, original, hidden, kwargs, store)
        store.open(self.tokens)
        who, cache = range(len(hidden)), kwargs["past_key_values"]
        running = Running(self, number, original, hidden, kwargs, store.layout, who, None, cache)
        return run_action(actions, running)

    def _prefill(self, number: int, original: Any, hidden: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        session, logical = self.session, hidden
        cache: Cache | None = kwargs.get("past_key_values")
        until = session.parts.logical_until
        if number == 0 and cache is not None:
            fixed = static.layers_for(cache, self.tokens) if static.takes(cache) else None
            ragged.adopt(cache, fixed or [ragged.RaggedLayer() for _ in session.parts.layers], session)
        kwargs = self._cut_mask(kwargs)
        if 0 < number <= until and session.layout is not None:
            hidden = session.layout.gather(hidden)
        here = Here(self, number, kwargs)
        if number == 0:
            session.inputs.begin(hidden)
        hidden = session.enter(number, hidden, here)
        with session.inputs.noting(here, hidden):
            hidden = self._act(number, original, hidden, kwargs, cache)
        hidden = session.leave(number, hidden, here)
        if number < until and session.layout is not None:
            return session.layout.put(hidden, logical)
        return hidden

    def _cut_mask(self, kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        """Masks for caches of fixed size have columns for later tokens, which a prefill does not see."""
        mask = kwargs.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.ndim != 4 or mask.shape[-1] == self.tokens:
            return kwargs
        return {**kwargs, "attention_mask": self.once((mask, "cut"), lambda: mask[..., : self.tokens])}

    def _act(
        self, number: int, original: Any, hidden: Tensor, kwargs: Mapping[str, Any], cache: Cache | None
    ) -> Tensor:
        session = self.session
        actions, decoding = session.actions(number), session.decoding(number)
        layout = self.localised(session.layout, kwargs)
        store: ragged.RaggedLayer | None = None
        if cache is not None:
            found = cache.layers[number]
            assert isinstance(found, ragged.RaggedLayer)
            store = found
            store.begin(self._held(layout, actions, decoding), decoding)
            store.open(self.tokens)
        if session.mid_cuts(number) and any(session.counts):
            with cutting(session, Here(self, number, kwargs), actions) as mid:
                running = Running(self, number, original, hidden, kwargs, layout, range(len(hidden)), None, cache)
                return mid.leave(run_action(actions[0], running))
        mixed = len(set(actions)) > 1 or (store is not None and store.rows not in (None, ()))
        if mixed:
            return self._groups(number, actions, original, hidden, kwargs, store)
        running = Running(self, number, original, hidden, kwargs, layout, range(len(hidden)), None, cache)
        return run_action(actions[0], running)

    def localised(self, layout: Layout | None, kwargs: Mapping[str, Any]) -> Layout | None:
        """The layout with what its rotary positions moved by, where the pipeline renumbers positions."""
        if layout is None or self.session.bound.positions == "keep":
            return layout
        rotary = kwargs["position_embeddings"]
        shifted: Layout = self.once((layout, rotary, "shift"), lambda: self.rotations.shifted(rotary, layout))
        return shifted

    def _held(
        self, layout: Layout | None, actions: Sequence[LayerAction], decoding: Sequence[LayerAction]
    ) -> Layout | None:
        """What the layer's KV will hold of the prompt, for the rows that decoding reads."""
        rows = [row for row, action in enumerate(decoding) if action.writes_kv]
        missing = [row for row in rows if not actions[row].writes_kv]
        if not rows or (not missing and len(rows) == len(actions)):
            return layout
        if not missing and layout is None:
            return None
        layout = layout or Layout.full(self.session.prompt.ids)
        if len(missing) == len(actions):
            return Layout(layout.index[:, :0], None, layout.length, shift=layout.shift)
        if missing:
            written = torch.tensor([action.writes_kv for action in actions], device=layout.index.device)
            layout = Layout(layout.index, layout.present & written[:, None], layout.length, layout.sizes, layout.shift)
        return layout.select(self.session.index(rows)) if len(rows) < len(actions) else layout

    def _groups(
        self,
        number: int,
        actions: Sequence[LayerAction],
        original: Any,
        hidden: Tensor,
        kwargs: Mapping[str, Any],
        store: ragged.RaggedLayer | None,
    ) -> Tensor:
        """Rows that do the same run together; rows that skip cost nothing."""
        if store is not None and not self.prefill:
            store.open(self.tokens)
        shares = None if store is None else Shares(store, len(actions), self.prefill)
        results = hidden
        for action in dict.fromkeys(actions):
            rows = [row for row, one in enumerate(actions) if one is action]
            if action is LayerAction.SKIP:
                continue
            index = self.session.index(rows)
            layout = self._layout_of(rows, kwargs, store) if action.writes_kv else None
            cache = None if shares is None else shares.of(rows)
            part = Running(self, number, original, select_rows(hidden, index), kwargs, layout, rows, index, cache)
            results = results.index_copy(0, index.to(hidden.device), run_action(action, part))
        if shares is not None:
            shares.close()
        return results

    def _layout_of(self, rows: list[int], kwargs: Mapping[str, Any], store: ragged.RaggedLayer | None) -> Layout | None:
        if self.prefill:
            layout = self.localised(self.session.layout, kwargs)
            return None if layout is None else layout.select(self.session.index(rows))
        if store is None or store.layout is None:
            return None
        stored = rows if store.rows is None else [store.rows.index(row) for row in rows]
        return store.layout.select(self.session.index(stored))

    def once(self, of: tuple[object, ...], make: Callable[[], Any]) -> Any:
        """Layers that share a layout share its masks and rotations.

        Objects are told apart by identity, and kept beside the result: the address of a lost one is given out anew.
        """
        key = tuple(map(id, of))
        if key not in self.memo:
            self.memo[key] = make(), of
        return self.memo[key][0]


STEP: ContextVar[Step | None] = ContextVar("prunekit_step", default=None)
