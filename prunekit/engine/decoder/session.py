"""The state of one prompt batch: which tokens are alive, what was decided, and what each layer therefore runs on."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from prunekit.engine.asking import decide
from prunekit.engine.cache import ragged
from prunekit.engine.decoder.readings import Inputs, Needs
from prunekit.engine.decoder.routers import by_scores, route
from prunekit.engine.decoder.view import Here, View
from prunekit.engine.prompt.prompt import Prompt
from prunekit.engine.summary import summarise
from prunekit.engine.tokens.layout import Layout, blank, take
from prunekit.engine.tokens.merges import merged
from prunekit.engine.tower.record import dropped_in_tower, tower_events, tower_tokens
from prunekit.errors import PrunekitWarning, Unsupported
from prunekit.families.base import Parts
from prunekit.pipeline.build import BoundPipeline, Pipeline
from prunekit.pipeline.stage import Cut, Stage
from prunekit.records import RunReport, StageEvent
from prunekit.strategy.decisions import LayerAction, LayerPlan, Selection
from prunekit.strategy.sites import ENCODER, PREFILL_END, Site

NO_IMAGE = "no visual tokens in this batch: token stages had nothing to do, all tokens ran"


@dataclass(frozen=True)
class _Decision:
    """A stage's answer, kept on its device until somebody asks for a report."""

    cut: Cut
    entered: tuple[int, ...]
    ordinals: Tensor
    selection: Selection
    asked: tuple[int, ...] | None

    def event(self) -> StageEvent:
        rows = list(zip(self.ordinals.tolist(), self.selection.keep.tolist(), strict=True))
        kept = tuple(tuple(o for o, k in zip(ordinals, keep, strict=True) if k) for ordinals, keep in rows)
        stage, sizes = self.cut.stage, None
        if self.selection.sizes is not None:
            given = self.selection.sizes.tolist()
            pairs = zip(given, (keep for _, keep in rows), strict=True)
            sizes = tuple(tuple(s for s, k in zip(row, keep, strict=True) if k) for row, keep in pairs)
        return StageEvent(
            stage.use, stage.index, str(self.cut.site), self.entered, kept, self.selection.crop, sizes, self.asked
        )


class Session:
    """One prompt batch under one pipeline. Lives on the KV cache that the batch fills.

    itemsize: bytes of one number of the hidden states, and so of the KV cache. positions: `keep` or `renumber`.
    """

    def __init__(self, bound: BoundPipeline, parts: Parts, prompt: Prompt, itemsize: int, needs: Needs) -> None:
        self.bound, self.parts, self.prompt, self.itemsize = bound, parts, prompt, itemsize
        self.layout: Layout | None = None
        self.counts = prompt.visual_counts
        self.lengths = prompt.lengths
        self.plans: tuple[LayerPlan, ...] = (bound.plan,) * len(prompt.lengths)
        self.layer_tokens: list[tuple[int, ...]] = []
        self.layer_visual: list[tuple[int, ...]] = []
        self.mlp_tokens: list[tuple[int, ...]] = []
        self.decisions: list[_Decision] = []
        self.notes: list[str] = []
        self.scores: dict[int, Tensor | None] = {}
        self.cropped: Tensor | None = None
        self.states: dict[int, dict[Any, Any]] = {}
        self.inputs = Inputs(self, needs)
        self._row_index: dict[tuple[int, ...], Tensor] = {}
        self._note_missing_images()

    def __deepcopy__(self, memo: object) -> Session:
        """Itself: what was decided at prefill no longer changes, so copies of a cache share it."""
        return self

    def __reduce__(self) -> Any:
        raise Unsupported("a pruned KV cache belongs to its model and its `with` block, so it cannot be pickled")

    def _note_missing_images(self) -> None:
        without = [str(row) for row, count in enumerate(self.counts) if count == 0]
        if self.bound.cuts and not any(self.counts):
            self.notes.append(NO_IMAGE)
            warnings.warn(NO_IMAGE, PrunekitWarning, stacklevel=2)
        elif self.bound.cuts and without:
            self.notes.append(f"no visual tokens in samples {', '.join(without)}: all their tokens ran")

    def refuse_other(self, pipeline: Pipeline, parts: Parts) -> None:
        """Raise Unsupported when another pipeline or model goes on with this session's cache."""
        if pipeline.sha != self.bound.sha or parts.base is not self.parts.base:
            raise Unsupported(
                f"this KV cache was pruned by pipeline '{self.bound.name}' ({self.bound.sha}); "
                "continue under the same pipeline and model, or start with a new cache"
            )

    def enter(self, number: int, hidden: Tensor, here: Here) -> Tensor:
        """What happens before layer `number`, on physical hidden states (B, K, H); returns what is left of them."""
        if number == 0:
            hidden = self._leave_tower(hidden)
            hidden = self._cuts(lambda cut: cut.site == ENCODER and not cut.stage.is_router, hidden, here)
            for router in self.bound.routers:
                hidden = self._route(router, hidden, here)
        hidden = self._cuts(lambda cut: cut.site == Site(number), hidden, here)
        self.layer_tokens.append(self.lengths)
        self.layer_visual.append(self.counts)
        return hidden

    def _route(self, router: Stage, hidden: Tensor, here: Here) -> Tensor:
        embeds = hidden if self.layout is None else self.layout.expand(hidden)
        self.scores[router.index], self.plans = route(router, self, embeds)
        return self._cuts(lambda cut: cut.site == ENCODER and cut.stage is router, hidden, here)

    def leave(self, number: int, hidden: Tensor, here: Here) -> Tensor:
        """What happens after layer `number`; as `enter`."""
        feeds = (plan[number].feeds_mlp for plan in self.plans)
        frozen = (plan[number] is LayerAction.FREEZE for plan in self.plans)
        self.mlp_tokens.append(tuple(map(_fed, self.lengths, self.counts, feeds, frozen)))
        return self._cuts(lambda cut: cut.site == Site(number, "layer", "after"), hidden, here)

    def _leave_tower(self, hidden: Tensor) -> Tensor:
        """What was dropped inside the vision tower leaves at the decoder's door."""
        gone = dropped_in_tower(self.prompt) if any(cut.site.place == "vision" for cut in self.bound.cuts) else None
        if gone is None:
            return hidden
        kept = tuple((self.prompt.visual & ~gone).sum(1).tolist())
        self.lengths = tuple(n - b + a for n, b, a in zip(self.lengths, self.counts, kept, strict=True))
        self.counts = kept
        self.layout, slots = Layout.full(self.prompt.ids).narrow(self.prompt.real & ~gone, list(self.lengths))
        return take(hidden, slots, 1)

    def mid_cuts(self, number: int) -> list[Cut]:
        """The cuts between attention and MLP of layer `number`."""
        return [cut for cut in self.bound.cuts if cut.site == Site(number, "layer", "mid")]

    def end(self, hidden: Tensor, here: Here, cache: Cache | None) -> None:
        """What happens after the prefill: nothing to the states, but the KV cache loses what was cropped."""
        self._cuts(lambda cut: cut.site == PREFILL_END, hidden, here)
        self.inputs.finish()
        # What stages remembered was for this prefill; the session lives on with the cache.
        self.states.clear()
        self.scores.clear()
        if self.cropped is None or cache is None:
            return
        known: dict[Any, tuple[Layout, Tensor]] = {}
        for store in cache.layers:
            assert isinstance(store, ragged.RaggedLayer)
            if len(store):
                self._crop(store, self.cropped, known)

    def _crop(self, store: ragged.RaggedLayer, cropped: Tensor, known: dict[Any, tuple[Layout, Tensor]]) -> None:
        key = id(store.layout), store.rows
        if key not in known:
            ids, rows = self.prompt.ids, None if store.rows is None else self.index(store.rows)
            if rows is not None:
                ids, cropped = ids[rows], cropped[rows]
            layout = store.layout or Layout.full(ids)
            real = self.prompt.real if rows is None else self.prompt.real[rows]
            keep = layout.gather(real) & layout.present & ~layout.gather(cropped)
            lengths = keep.sum(1).tolist()
            narrowed, slots = layout.narrow(keep, lengths)
            known[key] = narrowed.with_shift(layout.shift), slots
        store.narrow(*known[key])

    def _cuts(self, now: Callable[[Cut], bool], hidden: Tensor, here: Here) -> Tensor:
        for cut in self.bound.cuts:
            if now(cut) and any(self.counts):
                hidden, slots = self.cut(cut, hidden, here)
                if slots is not None:
                    hidden = take(hidden, slots, 1)
        return hidden

    def cut(self, cut: Cut, hidden: Tensor, here: Here) -> tuple[Tensor, Tensor | None]:
        """Let a stage decide about the visual tokens among physical `hidden` (B, K, H).

        Returns the states with what was merged, still (B, K, H), and the slots that remain, int64 (B, K'); None: all.
        """
        layout = self.layout or Layout.full(self.prompt.ids)
        present = layout.gather(self.prompt.real) if layout.valid is None else layout.valid
        visual = layout.gather(self.prompt.visual) & present
        wanted = None
        if cut.keep is not None:
            wanted = tuple(map(cut.keep.count, self.prompt.visual_counts, self.counts))
        view = View(self, here, cut, layout, hidden, visual, wanted)
        routed = cut.stage.is_router
        selection = by_scores(cut.stage, self.scores[cut.stage.index], view) if routed else decide(cut.stage, view)
        if cut.site == PREFILL_END:
            selection = Selection(selection.keep, crop=True)
        self.decisions.append(_Decision(cut, self.counts, view.ordinals, selection, wanted))
        if selection.weights is not None:
            hidden = _merge(hidden, view, selection)
        if selection.sizes is not None:
            self.layout = layout = layout.with_sizes(self._sizes(layout, view, selection))
        return hidden, self._narrow(layout, view, present, selection)

    def _sizes(self, layout: Layout, view: View, selection: Selection) -> Tensor:
        if self.parts.attention_implementation not in ("sdpa", "eager"):
            raise Unsupported("token sizes add to attention logits, which flash kernels do not take; use sdpa or eager")
        assert selection.sizes is not None
        ones = torch.ones_like(layout.index, dtype=torch.promote_types(selection.sizes.dtype, torch.float32))
        before = ones if layout.sizes is None else layout.sizes
        given = torch.where(selection.keep, selection.sizes.to(before), before.gather(1, view.slots))
        return before.scatter(1, view.slots, torch.where(view.valid, given, before.gather(1, view.slots)))

    def _narrow(self, layout: Layout, view: View, present: Tensor, selection: Selection) -> Tensor | None:
        kept = tuple(selection.keep.sum(1).tolist())
        if kept == self.counts:
            return None
        if selection.crop:
            dropped = view.valid & ~selection.keep
            gone = torch.zeros_like(self.prompt.real).scatter_(1, view.positions, dropped)
            self.cropped = gone if self.cropped is None else self.cropped | gone
        chosen = torch.zeros_like(present).scatter_(1, view.slots, selection.keep)
        self.lengths = tuple(
            n - before + after for n, before, after in zip(self.lengths, self.counts, kept, strict=True)
        )
        self.counts = kept
        self.layout, slots = layout.narrow((present & ~view.visual) | chosen, list(self.lengths))
        return slots

    def alive_visual(self) -> Tensor:
        """Which logical tokens are visual and have not been dropped: bool (B, S)."""
        if self.layout is None:
            return self.prompt.visual
        alive = torch.zeros_like(self.prompt.visual)
        return alive.scatter_reduce_(1, self.layout.index, self.layout.present, "amax") & self.prompt.visual

    def visual_slots(self) -> Tensor:
        """Which physical slots hold visual tokens: bool (B, K)."""
        if self.layout is None:
            return self.prompt.visual
        return self.layout.gather(self.prompt.visual) & self.layout.present

    def index(self, rows: Sequence[int]) -> Tensor:
        """`rows` on the device; the same rows give the same tensor, by which layers share what they select."""
        key = tuple(rows)
        if key not in self._row_index:
            self._row_index[key] = torch.tensor(key, dtype=torch.int64, device=self.prompt.ids.device)
        return self._row_index[key]

    def actions(self, number: int) -> tuple[LayerAction, ...]:
        """What the prefill does with a layer, row by row."""
        return tuple(plan[number] for plan in self.plans)

    def decoding(self, number: int) -> tuple[LayerAction, ...]:
        """What decoding does with a layer, row by row."""
        return tuple(plan.decoding(number) for plan in self.plans)

    def report(self) -> RunReport:
        """What the prefill did; reads the decisions back from their device."""
        every = [self.lengths] * self.bound.shape.layers
        return summarise(
            self.bound,
            self.plans,
            prompt_tokens=self.prompt.lengths,
            visual_tokens=self.prompt.visual_counts,
            kept_tokens=self.counts,
            events=(*tower_events(self.prompt), *(decision.event() for decision in self.decisions)),
            layer_tokens=_by_row(self.layer_tokens or every),
            layer_visual=_by_row(self.layer_visual or [self.counts] * self.bound.shape.layers),
            mlp_tokens=_by_row(self.mlp_tokens or every),
            notes=tuple(self.notes),
            tower_tokens=tower_tokens(self.prompt),
            itemsize=self.itemsize,
        )


def _by_row(layers: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
    return tuple(zip(*layers, strict=True))


def _fed(tokens: int, visual: int, feeds: bool, frozen: bool) -> int:
    """How many of a row's tokens went through an MLP."""
    return (tokens - visual if frozen else tokens) if feeds else 0


def _merge(hidden: Tensor, view: View, selection: Selection) -> Tensor:
    """Write what tokens, and extras after them, are merged to into the slots of the kept ones."""
    weights = selection.weights
    assert weights is not None
    before = take(hidden, view.slots, 1)
    takes_extras = isinstance(weights, Tensor) and weights.shape[-1] > before.shape[1]
    states = merged(weights, blank(before, view.valid), view.sizes, view.extras if takes_extras else None)
    slots = view.slots.to(hidden.device)[..., None].expand_as(states)
    return hidden.scatter(1, slots, torch.where(selection.keep.to(hidden.device)[..., None], states, before))
