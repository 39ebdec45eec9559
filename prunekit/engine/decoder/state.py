"""The state of one prompt batch: which tokens are alive, what was decided, and what each layer therefore runs on."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from prunekit.engine.prompt.prompt import Prompt
from prunekit.engine.tokens.layout import Layout
from prunekit.errors import PrunekitWarning, Unsupported
from prunekit.families.base import Parts
from prunekit.ops.host import on_device
from prunekit.pipeline.bound import BoundPipeline
from prunekit.pipeline.cut import Cut
from prunekit.records import StageEvent
from prunekit.strategy.decisions import LayerAction, LayerPlan, Selection

NO_IMAGE = "no visual tokens in this batch: token stages had nothing to do, all tokens ran"
Actions = tuple[LayerAction, ...]  # row by row


@dataclass(frozen=True)
class Decision:
    """A stage's answer at one cut, kept on its device until somebody asks for a report.

    entered: visual tokens of each row that reached the cut. ordinals: int64 (B, V), their numbers among the original
    visual tokens of their row. asked: how many to keep of each row, None for a stage that decides by itself. scores:
    float (B, V), by which it decided, only where a trace is wanted; None: of none.
    """

    cut: Cut
    entered: tuple[int, ...]
    ordinals: Tensor
    selection: Selection
    asked: tuple[int, ...] | None
    scores: Tensor | None = None

    def event(self) -> StageEvent:
        """The same as plain numbers; reads tensors back from their device."""
        keeps = self.selection.keep.tolist()

        def kept(table: Tensor) -> tuple[tuple[Any, ...], ...]:
            rows = zip(table.tolist(), keeps, strict=True)
            return tuple(tuple(one for one, keep in zip(*row, strict=True) if keep) for row in rows)

        stage, sizes = self.cut.stage, self.selection.sizes
        return StageEvent(
            stage.use, stage.index, str(self.cut.site), self.entered, kept(self.ordinals), self.selection.crop,
            None if sizes is None else kept(sizes), self.asked,
        )  # fmt: skip


@dataclass(eq=False)
class BatchState:
    """One prompt batch under one pipeline. Lives on the KV cache that the batch fills.

    itemsize: bytes of one number of the hidden states, and so of the KV cache.
    processor: that of the model, for hooks that read the prompt as text; None: no hook does.
    traced: whether decisions keep what a trace tells of them beside what stays.
    layout: the tokens that are alive; None: all. counts, lengths: visual and all tokens of each row that are alive.
    plans: what becomes of the layers, row by row. layer_tokens, layer_visual, mlp_tokens: for each layer that has run,
    the rows' tokens that entered it, the visual ones among them, and the tokens that went through its MLP.
    layer_keys: for each of them the tokens that those which entered it can attend to. passing: layers that decoding
    simply runs. alike: all layers are given the same attention mask. scores: of routers, by the index of their stage.
    wanted: of how many tokens, the last ones, the caller wants logits; 0: of all. cropped: bool (B, S), tokens that
    leave the KV when the prefill is over; None: none. stage_states: the hooks' input `state`, by the index of the
    stage. harms: under a budget of risk, by row, what was predicted for each rung below the dense one. unsound: where
    something that the model computed is not finite, and of which samples, bool (B,); looks: how often that was looked
    for.
    """

    bound: BoundPipeline
    parts: Parts
    prompt: Prompt
    itemsize: int
    processor: Any = None
    traced: bool = False
    layout: Layout | None = None
    counts: tuple[int, ...] = field(init=False)
    lengths: tuple[int, ...] = field(init=False)
    plans: tuple[LayerPlan, ...] = field(init=False)
    layer_tokens: list[tuple[int, ...]] = field(default_factory=list)
    layer_visual: list[tuple[int, ...]] = field(default_factory=list)
    mlp_tokens: list[tuple[int, ...]] = field(default_factory=list)
    layer_keys: list[tuple[int, ...]] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    scores: dict[int, Tensor | None] = field(default_factory=dict)
    wanted: int = 0
    cropped: Tensor | None = None
    passing: frozenset[int] = frozenset()
    alike: bool = False
    stage_states: dict[int, dict[Any, Any]] = field(default_factory=dict)
    harms: dict[int, tuple[float, ...]] = field(default_factory=dict)
    unsound: dict[str, Tensor] = field(default_factory=dict)
    looks: int = 0
    _row_index: dict[tuple[int, ...], Tensor] = field(default_factory=dict)
    _both: dict[int, tuple[tuple[LayerPlan, ...], tuple[Actions, Actions]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.counts, self.lengths = self.prompt.visual_counts, self.prompt.lengths
        self.plans = (self.bound.plan,) * len(self.lengths)
        self._note_missing_images()

    def _note_missing_images(self) -> None:
        without = [str(row) for row, count in enumerate(self.counts) if count == 0]
        if self.bound.cuts and not any(self.counts):
            self.notes.append(NO_IMAGE)
            warnings.warn(NO_IMAGE, PrunekitWarning, stacklevel=2)
        elif self.bound.cuts and without:
            self.notes.append(f"no visual tokens in samples {', '.join(without)}: all their tokens ran")

    def note_length(self, tokens: int, positions: Tensor | None) -> None:
        """Note a prompt that goes beyond the positions that its decoder says to know.

        tokens: of the prompt, padding among them. positions: int64 (B, S), or one for each axis of rotation (3, B, S),
        of which others may stand in front; None: the decoder counts tokens. Read back only for long prompts.
        """
        limit = getattr(self.parts.text.config, "max_position_embeddings", None)
        if limit is None or tokens <= limit:
            return
        needed = tokens if positions is None else 1 + int((positions if positions.ndim < 3 else positions[-3:]).max())
        if needed > limit:
            self.notes.append(
                f"the prompt takes {needed} positions, more than the model's max_position_embeddings of {limit}: "
                "answers may be poor with or without pruning"
            )

    def see(self, place: str, unsound: Tensor) -> None:
        """Remember for which samples, bool (B,), what the model computed is not finite; read back for a report only."""
        before = self.unsound.get(place)
        self.unsound[place] = unsound if before is None else before | unsound.to(before.device)
        self.looks += 1

    def __deepcopy__(self, memo: object) -> BatchState:
        """Itself: what was decided at prefill no longer changes, so copies of a cache share it."""
        return self

    def __reduce__(self) -> Any:
        raise Unsupported("a pruned KV cache belongs to its model and its `with` block, so it cannot be pickled")

    def refuse_other(self, sha: str, parts: Parts) -> None:
        """Raise Unsupported when another pipeline or model goes on with this batch's cache."""
        own = self.bound
        if sha != own.sha or parts.base is not self.parts.base:
            raise Unsupported(
                f"this KV cache was pruned by pipeline '{own.name}' ({own.sha}); "
                "continue under the same pipeline and model, or start with a new cache"
            )

    def rung(self, row: int) -> int:
        """The rung that a sample takes under a budget of risk; 0, the dense one, where it was not asked about."""
        ladder = self.bound.ladder
        return 0 if ladder is None else sum(harm < ladder.threshold for harm in self.harms.get(row, ()))

    def finish(self) -> None:
        """Let go of what only the prefill needs: the state lives on with the cache."""
        self.stage_states.clear()
        self.scores.clear()

    @cached_property
    def text(self) -> Tensor:
        """Tokens of the prompt that are neither visual nor padding, bool (B, S)."""
        return self.prompt.real & ~self.prompt.visual

    @cached_property
    def text_after(self) -> Tensor:
        """Those behind their row's last visual token, bool (B, S)."""
        return self.text & (self.prompt.visual.flip(1).cumsum(1).flip(1) == 0)

    @property
    def has_visual(self) -> bool:
        """Some visual token is alive."""
        return any(self.counts)

    def full_layout(self) -> Layout:
        """`layout`, with None made explicit."""
        return self.layout or Layout.full(self.prompt.ids)

    def narrow(self, layout: Layout, keep: Tensor, counts: tuple[int, ...]) -> Tensor:
        """Let only the slots `keep` of `layout`, bool (B, K), live on, `counts` visual ones in each row.

        Returns the slots that remain, int64 (B, K').
        """
        changed = zip(self.lengths, self.counts, counts, strict=True)
        self.lengths = tuple(length - before + after for length, before, after in changed)
        self.counts = counts
        self.layout, slots = layout.narrow(keep, list(self.lengths))
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
            self._row_index[key] = on_device(key, self.prompt.ids.device)
        return self._row_index[key]

    def actions(self, number: int) -> Actions:
        """What the prefill does with a layer, row by row."""
        return self._phases(number)[0]

    def decoding(self, number: int) -> Actions:
        """What decoding does with a layer, row by row."""
        return self._phases(number)[1]

    def _phases(self, number: int) -> tuple[Actions, Actions]:
        """Both, made once for a layer and the plans: rows of most batches share one."""
        plans, both = self._both.get(number, (None, ((), ())))
        if plans is not self.plans:
            first, rows = self.plans[0], len(self.plans)
            some = self.plans[:1] if self.plans.count(first) == rows else self.plans
            many = rows // len(some)
            both = tuple(plan[number] for plan in some) * many, tuple(plan.decoding(number) for plan in some) * many
            self._both[number] = self.plans, both
        return both

    @property
    def last_only(self) -> int | None:
        """From this layer on only the last `wanted` tokens run, as nobody needs what the others would become there."""
        return self.bound.last_only if self.wanted else None

    def entering(self, number: int) -> tuple[int, ...]:
        """How many of the tokens that are alive enter layer `number`."""
        if self.last_only is None or number < self.last_only:
            return self.lengths
        return tuple(min(length, self.wanted) for length in self.lengths)

    def last_logical(self, hidden: Tensor) -> Tensor:
        """The last `wanted` tokens of the complete sequence, (B, wanted, H), from the last physical ones."""
        if self.layout is None:
            return hidden
        return self.layout.last(hidden.shape[1]).expand(hidden)[:, -self.wanted :]

    def count_entering(self) -> None:
        """Count the tokens that are alive as those that enter the next layer, or can be attended to there."""
        self.layer_tokens.append(self.entering(len(self.layer_tokens)))
        self.layer_visual.append(self.counts)
        self.layer_keys.append(self.lengths)

    def count_leaving(self, number: int) -> None:
        """Count the tokens that went through the MLP of layer `number`."""
        actions, entering = self.actions(number), self.entering(number)
        if actions.count(LayerAction.RUN) == len(actions):
            self.mlp_tokens.append(entering)
            return
        rows = zip(actions, entering, self.counts, strict=True)
        self.mlp_tokens.append(tuple(_fed(action, tokens, visual) for action, tokens, visual in rows))


def _fed(action: LayerAction, tokens: int, visual: int) -> int:
    """How many of a row's tokens go through an MLP."""
    if not action.feeds_mlp:
        return 0
    return tokens - visual if action is LayerAction.FREEZE else tokens
