"""Carrying out a cut: a stage decides about the visual tokens that are alive, and the batch's state follows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from prunekit.engine.asking import Answer, decide
from prunekit.engine.cache import ragged
from prunekit.engine.decoder.forward_pass import Here
from prunekit.engine.decoder.ladder import choose, count_at, counts_at
from prunekit.engine.decoder.readings import Readings
from prunekit.engine.decoder.routers import by_scores, route
from prunekit.engine.decoder.site_tokens import SiteTokens
from prunekit.engine.decoder.state import BatchState, Decision
from prunekit.engine.decoder.view import View
from prunekit.engine.tokens.layout import Layout, blank, per_token, take
from prunekit.engine.tokens.merges import merged
from prunekit.engine.tokens.streams import main_stream
from prunekit.engine.tower.record import dropped_in_tower
from prunekit.errors import PluginError, Unsupported
from prunekit.pipeline.cut import Cut
from prunekit.pipeline.stage import Stage
from prunekit.strategy.decisions import Owners, Selection
from prunekit.strategy.sites import PREFILL_END, Site


@dataclass(frozen=True)
class Cutter:
    """Makes the cuts of one prompt batch; states of hidden tokens are physical, (B, K, H)."""

    state: BatchState
    readings: Readings

    def leave_tower(self, hidden: Tensor) -> Tensor:
        """What was dropped inside the vision tower leaves before decoder layer 0."""
        state = self.state
        in_tower = any(cut.site.in_tower for cut in state.bound.cuts)
        dropped = dropped_in_tower(state.prompt) if in_tower else None
        if dropped is None:
            return hidden
        counts = tuple((state.prompt.visual & ~dropped).sum(1).tolist())
        return take(hidden, state.narrow(Layout.full(state.prompt.ids), state.prompt.real & ~dropped, counts), 1)

    def at(self, site: Site, hidden: Tensor, here: Here) -> Tensor:
        """All cuts at `site`; returns the states that remain. Routers are asked after all other stages there."""
        cuts = [cut for cut in self.state.bound.cuts if cut.site == site]
        hidden = self._make([cut for cut in cuts if not cut.routes_here], hidden, here)
        for router in self.state.bound.routers:
            if router.route_at != site:
                continue
            self._route(router, hidden, here)
            hidden = self._make([cut for cut in cuts if cut.stage is router], hidden, here)
        return hidden

    def _make(self, cuts: Sequence[Cut], hidden: Tensor, here: Here) -> Tensor:
        for cut in cuts:
            hidden, slots = self.cut(cut, hidden, here)
            hidden = hidden if slots is None else take(hidden, slots, 1)
        return hidden

    def _route(self, router: Stage, hidden: Tensor, here: Here) -> None:
        state = self.state
        embeds = main_stream(hidden if state.layout is None else state.layout.expand(hidden), state.parts.stream)
        view = self._view(Cut(router.route_at, router, router.keeps[0] if router.keeps else None, 0), hidden, here)
        state.scores[router.index], state.plans = route(view, embeds)
        self.readings.check_plans()

    def _view(self, cut: Cut, hidden: Tensor, here: Here) -> View:
        state = self.state
        layout = state.full_layout()
        visual = layout.gather(state.prompt.visual) & layout.present
        count = None if cut.keep is None else counts_at(state, cut)
        return View(self.readings, here, cut, SiteTokens(state, layout, visual, state.counts), hidden, count)

    def cut(self, cut: Cut, hidden: Tensor, here: Here) -> tuple[Tensor, Tensor | None]:
        """Let a stage decide about the visual tokens among `hidden`; without any it is not asked.

        Returns the states with what was merged, still (B, K, H), and the slots that remain, int64 (B, K'); None: all.
        """
        state = self.state
        if not state.has_visual:
            return hidden, None
        view = self._view(cut, hidden, here)
        tokens = view.tokens
        answer = self._answer(cut, view)
        selection = answer.selection
        if cut.site == PREFILL_END:
            selection = Selection(selection.keep, crop=True)
        asked = self._asked(cut, view)
        state.decisions.append(Decision(cut, state.counts, tokens.ordinals, selection, asked, answer.scores))
        if selection.weights is not None:
            self._check_merge(cut)
            hidden = _merge(hidden, view, selection, selection.weights)
        if selection.sizes is not None:
            sized = tokens.layout.with_sizes(self._sizes(tokens, selection))
            state.layout = sized
            return hidden, self._narrow(sized, tokens, selection)
        return hidden, self._narrow(tokens.layout, tokens, selection)

    def _answer(self, cut: Cut, view: View) -> Answer:
        """What a token stage decides, or what follows from the scores that a router has given."""
        state = self.state
        if cut.stage.is_router:
            return by_scores(view, state.scores[cut.stage.index])
        open_ = view.count is None and cut.keep is not None
        answer = decide(cut.stage, view, state.traced, partial(self._climb, cut) if open_ else None)
        if answer.unsound is not None:
            state.see(f"{cut.stage.label} at '{cut.site}'", answer.unsound)
        return answer

    def _climb(self, cut: Cut, row: int | None, scores: Tensor) -> Any:
        """How many tokens a sample keeps under a budget of risk, by its scores, float (V,); row None: all, (B, V)."""
        if row is None:
            rows = enumerate(zip(scores, self.state.counts, strict=True))
            return tuple(self._climb(cut, b, own[:count]) if count else 0 for b, (own, count) in rows)
        choose(cut.stage, self.state, row, scores, None)
        return count_at(self.state, cut, row)

    def _asked(self, cut: Cut, view: View) -> tuple[int, ...] | None:
        """As `View.count`, once it is known."""
        return view.count if cut.keep is None or view.count is not None else counts_at(self.state, cut)

    def _check_merge(self, cut: Cut) -> None:
        """Raise Unsupported for a merge between attention and MLP that the rest of the layer would not follow."""
        if cut.site.point == "mid" and cut.site.in_decoder and not self.state.parts.mlp_last:
            raise Unsupported(
                f"{cut.stage.label} merges tokens inside layer {cut.site.layer}, whose states this model changes "
                f"further behind the MLP; merge at '{cut.site.layer}' or '{cut.site.layer}.after'"
            )

    def _sizes(self, tokens: SiteTokens, selection: Selection) -> Tensor:
        """The layout's sizes, float (B, K), with those of the tokens that a stage keeps."""
        if self.state.bound.shape.opaque:
            raise Unsupported(
                "token sizes add to attention logits, and this decoder can be cut at its input only: "
                f"{self.state.bound.shape.opaque}"
            )
        if self.state.parts.attention_implementation not in ("sdpa", "eager"):
            raise Unsupported("token sizes add to attention logits, which flash kernels do not take; use sdpa or eager")
        assert selection.sizes is not None
        wide = torch.promote_types(selection.sizes.dtype, torch.float32)
        sizes, slots = tokens.layout.sizes, tokens.slots
        sizes = torch.ones_like(tokens.layout.index, dtype=wide) if sizes is None else sizes
        before = sizes.gather(1, slots)
        return sizes.scatter(1, slots, torch.where(selection.keep, selection.sizes.to(sizes), before))

    def _narrow(self, layout: Layout, tokens: SiteTokens, selection: Selection) -> Tensor | None:
        state = self.state
        counts = tuple(selection.keep.sum(1).tolist())
        if counts == state.counts:
            return None
        if selection.crop:
            dropped = tokens.valid & ~selection.keep
            cropped = torch.zeros_like(state.prompt.real).scatter_(1, tokens.positions, dropped)
            state.cropped = cropped if state.cropped is None else state.cropped | cropped
        present = layout.gather(state.prompt.real) if layout.valid is None else layout.valid
        chosen = torch.zeros_like(present).scatter_(1, tokens.slots, selection.keep)
        return state.narrow(layout, (present & ~tokens.visual) | chosen, counts)

    def crop(self, cache: Cache) -> None:
        """Take what was cropped out of the KV that layers have already written."""
        if self.state.cropped is None:
            return
        narrowed: dict[Any, tuple[Layout, Tensor]] = {}
        for store in cache.layers:
            if isinstance(store, ragged.RaggedLayer) and len(store):
                key = id(store.layout), store.rows
                if key not in narrowed:
                    narrowed[key] = self._cropped(store, self.state.cropped)
                store.narrow(*narrowed[key])

    def _cropped(self, store: ragged.RaggedLayer, cropped: Tensor) -> tuple[Layout, Tensor]:
        """The layout of a layer's KV without `cropped`, bool (B, S), and the slots of it that remain."""
        ids, real = self.state.prompt.ids, self.state.prompt.real
        if store.rows is not None:
            rows = self.state.index(store.rows)
            ids, real, cropped = ids[rows], real[rows], cropped[rows]
        layout = store.layout or Layout.full(ids)
        keep = layout.gather(real) & layout.present & ~layout.gather(cropped)
        narrowed, slots = layout.narrow(keep, keep.sum(1).tolist())
        return narrowed.with_shift(layout.shift), slots


def _merge(hidden: Tensor, view: View, selection: Selection, weights: Tensor | Owners) -> Tensor:
    """`hidden` with what tokens, and extras after them, are merged to in the slots of the kept ones."""
    tokens, keep, extras = view.tokens, selection.keep, selection.extras
    before = take(hidden, tokens.slots, 1)
    if extras is not None and extras.shape[-1] != before.shape[-1]:
        raise PluginError(
            f"{view.place.stage.label}: select_tokens (extras) must be states of width {before.shape[-1]}, not "
            f"{extras.shape[-1]}"
        )
    if extras is None and isinstance(weights, Tensor) and weights.shape[-1] > before.shape[1]:
        extras = view.extras
    states = merged(weights, blank(before, tokens.valid), tokens.sizes, extras)
    slots = per_token(tokens.slots.to(hidden.device), states).expand_as(states)
    return hidden.scatter(1, slots, torch.where(per_token(keep.to(hidden.device), states), states, before))
