"""The state of one prompt batch: which tokens are alive, what was decided, and what each layer therefore runs on."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from prunekit.cost import cost_of, kv_tokens
from prunekit.decisions import LayerAction, Rows
from prunekit.engine import kv, masks
from prunekit.engine.layout import Layout
from prunekit.engine.probes import Tap, opened
from prunekit.engine.prompt import Prompt
from prunekit.engine.stages import decide
from prunekit.engine.view import View
from prunekit.errors import PrunekitWarning, Unsupported
from prunekit.families.base import Parts
from prunekit.pipeline import BoundPipeline, Pipeline, Stage
from prunekit.report import RunReport, StageEvent
from prunekit.sites import Site

NO_IMAGE = "no visual tokens in this batch: token stages had nothing to do, all tokens ran"


@dataclass(frozen=True)
class _Decision:
    """A stage's answer, kept on its device until somebody asks for a report."""

    stage: str
    site: Site
    entered: tuple[int, ...]
    ordinals: Tensor
    keep: Tensor

    def event(self) -> StageEvent:
        rows = zip(self.ordinals.tolist(), self.keep.tolist(), strict=True)
        kept = tuple(tuple(o for o, k in zip(ordinals, keep, strict=True) if k) for ordinals, keep in rows)
        return StageEvent(self.stage, str(self.site), self.entered, kept)


class Session:
    """One prompt batch under one pipeline. Lives on the KV cache that the batch fills.

    itemsize: bytes of one number of the hidden states, and so of the KV cache.
    """

    def __init__(self, bound: BoundPipeline, parts: Parts, prompt: Prompt, itemsize: int) -> None:
        self.bound, self.parts, self.prompt = bound, parts, prompt
        self.layout: Layout | None = None
        self.counts = prompt.visual_counts
        self.lengths = prompt.lengths
        self.layer_lengths: list[tuple[int, ...]] = []
        self.decisions: list[_Decision] = []
        self.rows: dict[int, Tensor] = {}
        self.reads = reading_layers(bound)
        self.itemsize = itemsize
        self.notes: list[str] = []
        self._states: dict[int, dict[Any, Any]] = {}
        without = [str(row) for row, count in enumerate(self.counts) if count == 0]
        if bound.token_stages and not any(self.counts):
            self.notes.append(NO_IMAGE)
            warnings.warn(NO_IMAGE, PrunekitWarning, stacklevel=2)
        elif bound.token_stages and without:
            self.notes.append(f"no visual tokens in samples {', '.join(without)}: all their tokens ran")

    def __deepcopy__(self, memo: object) -> Session:
        """Itself: what was decided at prefill no longer changes, so copies of a cache share it."""
        return self

    def refuse_other(self, pipeline: Pipeline, parts: Parts) -> None:
        """Raise Unsupported when another pipeline or model goes on with this session's cache."""
        if pipeline.sha != self.bound.pipeline.sha or parts.base is not self.parts.base:
            raise Unsupported(
                f"this KV cache was pruned by pipeline '{self.bound.pipeline.name}' ({self.bound.pipeline.sha}); "
                "continue under the same pipeline and model, or start with a new cache"
            )

    def enter(self, layer: int, hidden: Tensor) -> Tensor:
        """Run the token stages that stand before `layer` on physical hidden states (B, K, H); returns what is left."""
        for site, stage in self.bound.token_stages:
            if max(site.depth, 0) == layer and any(self.counts):
                hidden = self._prune(site, stage, hidden)
        self.layer_lengths.append(self.lengths)
        return hidden

    def _prune(self, site: Site, stage: Stage, hidden: Tensor) -> Tensor:
        layout = self.layout or Layout.full(self.prompt.ids)
        present = layout.gather(self.prompt.real) if layout.valid is None else layout.valid
        visual = layout.gather(self.prompt.visual) & present
        wanted = None
        if stage.keep is not None:
            wanted = tuple(map(stage.keep.count, self.prompt.visual_counts, self.counts))
        view = View(
            self.prompt, layout, hidden, visual, self.counts, wanted,
            rows=lambda: self.rows[site.depth - 1],
            heads=getattr(stage.strategy, "inputs", {}).get("attention", Rows()),
            grid=self.parts.coords, state=self._states.setdefault(stage.index, {}),
        )  # fmt: skip
        selection = decide(stage, view)
        self.decisions.append(_Decision(stage.use, site, self.counts, view.ordinals, selection.keep))
        if selection.weights is not None:
            hidden = _merge(hidden, view, selection.keep, selection.weights)
        kept = tuple(selection.keep.sum(1).tolist())
        if kept == self.counts:
            return hidden
        chosen = torch.zeros_like(present).scatter_(1, view.slots, selection.keep)
        self.lengths = tuple(
            n - before + after for n, before, after in zip(self.lengths, self.counts, kept, strict=True)
        )
        self.counts = kept
        self.layout, slots = layout.narrow((present & ~visual) | chosen, list(self.lengths))
        return hidden.gather(1, slots.to(hidden.device)[..., None].expand(-1, -1, hidden.shape[-1]))

    def tap(self, layer: int) -> Tap:
        """A tap for the attention row of each sample's last prompt token in `layer`."""
        slot = self.prompt.last if self.layout is None else torch.full_like(self.prompt.last, self.layout.width - 1)
        return Tap(getattr(self.parts.layers[layer], self.parts.attention), slot)

    def keep_rows(self, layer: int, tap: Tap) -> None:
        """Store what a tap took, over logical positions."""
        index = None if self.layout is None else self.layout.index
        self.rows[layer] = tap.logical(index, self.prompt.ids.shape[1])

    def report(self) -> RunReport:
        """What the prefill did; reads the decisions back from their device."""
        pipeline, plan = self.bound.pipeline, self.bound.plan
        layer_lengths = self.layer_lengths or [self.lengths] * self.bound.shape.layers
        layer_tokens = tuple(zip(*layer_lengths, strict=True))
        return RunReport(
            pipeline=pipeline.name,
            sha=pipeline.sha,
            samples=len(self.lengths),
            prompt_tokens=self.prompt.lengths,
            visual_tokens=self.prompt.visual_counts,
            kept_tokens=self.counts,
            events=tuple(decision.event() for decision in self.decisions),
            layer_tokens=layer_tokens,
            kv_tokens=tuple(kv_tokens(row, plan) for row in layer_tokens),
            actions=dict(plan),
            notes=tuple(self.notes),
            cost=cost_of(self.bound.shape, layer_tokens, self.prompt.lengths, plan, self.itemsize),
        )


def _merge(hidden: Tensor, view: View, keep: Tensor, weights: Tensor) -> Tensor:
    """Write the weighted sums of visual tokens into the slots of the kept ones."""
    slots = view.slots.to(hidden.device)[..., None].expand(-1, -1, hidden.shape[-1])
    before = hidden.gather(1, slots)
    inside = before.masked_fill(~view.valid.to(hidden.device)[..., None], 0.0)
    merged = weights.to(hidden.device, hidden.dtype) @ inside
    return hidden.scatter(1, slots, torch.where(keep.to(hidden.device)[..., None], merged, before))


@dataclass
class Step:
    """One forward pass of the decoder: the prefill of a session, or new tokens on its cache."""

    session: Session
    prefill: bool
    tokens: int
    additive: bool
    memo: dict[tuple[int, ...], tuple[Any, object]] = field(default_factory=dict)

    def run_layer(self, layer: int, original: Any, hidden: Tensor, kwargs: Mapping[str, Any]) -> Any:
        """Do what the session decided for `layer`: drop tokens before it, skip it, or run it on what is left."""
        session, cache = self.session, kwargs.get("past_key_values")
        if self.prefill:
            if layer == 0 and cache is not None:
                kv.adopt(cache, session.bound.shape.layers, session)
            hidden = session.enter(layer, hidden)
        store = self._open(layer, cache)
        if session.bound.plan[layer] is LayerAction.SKIP:
            return hidden
        layout = session.layout if self.prefill else store.layout if store is not None else None
        return original(hidden, **(dict(kwargs) if layout is None else self._localise(layout, store, hidden, kwargs)))

    def _open(self, layer: int, cache: Cache | None) -> kv.RaggedLayer | None:
        if cache is None:
            return None
        store = cache.layers[layer]
        assert isinstance(store, kv.RaggedLayer)
        if self.prefill:
            store.layout = self.session.layout
        store.open(self.tokens)
        return store

    def _localise(
        self, layout: Layout, store: kv.RaggedLayer | None, hidden: Tensor, kwargs: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The layer's arguments for the tokens that it really runs on and attends to."""
        local = dict(kwargs)
        mask = kwargs.get("attention_mask")
        if self.prefill:
            cos_sin = kwargs["position_embeddings"]
            local["attention_mask"] = self._once(
                (layout, mask), lambda: masks.prefill_mask(mask, layout, hidden, self.additive)
            )
            local["position_embeddings"] = self._once(
                (layout, cos_sin), lambda: tuple(layout.gather(part) for part in cos_sin)
            )
            # Flash kernels read gaps in position_ids as packed sequences; rotation comes from position_embeddings.
            local["position_ids"] = None
        elif store is not None:
            tail = store.tail
            local["attention_mask"] = self._once(
                (layout, mask),
                lambda: masks.decode_mask(mask, layout, tail, self.tokens, hidden, self.additive),
            )
        return local

    def _once(self, of: tuple[object, ...], make: Any) -> Any:
        """Layers that share a layout share its masks and rotations.

        Objects are told apart by identity, and kept beside the result: the address of a lost one is given out anew.
        """
        key = tuple(map(id, of))
        if key not in self.memo:
            self.memo[key] = make(), of
        return self.memo[key][0]


STEP: ContextVar[Step | None] = ContextVar("prunekit_step", default=None)


def attend(step: Step, layer: int, original: Any, args: Any, kwargs: Any) -> Any:
    """Run an attention module, or leave it out, or take a row from it, as the session needs."""
    session = step.session
    if session.bound.plan[layer] is LayerAction.SKIP_ATTENTION:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        return torch.zeros_like(hidden), None
    if not (step.prefill and any(session.counts) and layer + 1 in session.reads):
        return original(*args, **kwargs)
    with opened(session.tap(layer)) as tap:
        output = original(*args, **kwargs)
    if tap.row is None:
        tap.from_weights(output[1])
    session.keep_rows(layer, tap)
    return output


def reading_layers(bound: BoundPipeline) -> frozenset[int]:
    """Layers before which a stage reads the attention of the layer that has just run."""
    return frozenset(site.depth for site, stage in bound.token_stages if stage.asks_for("attention"))
