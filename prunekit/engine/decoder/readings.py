"""What is recorded while a prompt batch runs, because a later stage reads it: nothing that no hook names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from prunekit.engine.attention.attended import Attended
from prunekit.engine.attention.decoder_rows import attention
from prunekit.engine.attention.tap import Record, method, recorded
from prunekit.engine.decoder import aside
from prunekit.engine.decoder.aside import Aside
from prunekit.engine.decoder.forward_pass import Here
from prunekit.engine.decoder.site_tokens import SiteTokens
from prunekit.engine.decoder.state import BatchState
from prunekit.engine.tokens.layout import Layout, blank, leftmost, take
from prunekit.engine.tokens.streams import main_stream
from prunekit.errors import PluginError, Unsupported
from prunekit.pipeline.bound import BoundPipeline
from prunekit.pipeline.cut import Cut
from prunekit.strategy import decoder_requests
from prunekit.strategy import inputs as table
from prunekit.strategy.decisions import LayerAction
from prunekit.strategy.decoder_requests import PromptTokens, Rows

# Layers that run for all their tokens at once, so that one look at their attention shows everything.
WHOLE = frozenset({LayerAction.RUN, LayerAction.SKIP_MLP})


@dataclass(frozen=True)
class Needs:
    """What the stages of a pipeline read, by decoder layer.

    recorded: layers whose queries, keys and values are recorded while they run. read: those, and layers that are called
    again for queries and keys without rotation. entered: layers whose input is kept.
    behind: layers inside which a cut reads the layer before.
    embeds: whether the prompt's embeddings are kept. kernels: whether attention is read, in a run or ahead.
    positions: whether the rotary module's position ids are kept.
    """

    recorded: frozenset[int] = frozenset()
    read: frozenset[int] = frozenset()
    entered: frozenset[int] = frozenset()
    behind: frozenset[int] = frozenset()
    embeds: bool = False
    kernels: bool = False
    positions: bool = False

    @classmethod
    def of(cls, bound: BoundPipeline) -> Needs:
        """Of all cuts of a bound pipeline, whose inputs `bind` has found to exist at their sites."""
        record: set[int] = set()
        read: set[int] = set()
        entered: set[int] = set()
        behind: set[int] = set()
        embeds = kernels = positions = False
        layers = bound.shape.layers
        for cut in bound.asked:
            names = _named(cut)
            for spec in (spec for name in names for spec in table.requests(cut.stage.inputs, name)):
                layer = decoder_requests.layer_of(spec.layer, cut.site, layers)
                if layer is None:
                    assert decoder_requests.is_optional(spec), "checked by bind"
                    continue
                kernels = True
                embeds = embeds or callable(getattr(spec, "queries", None))
                if spec.layer != "next":
                    read.add(layer)
                    behind |= {layer + 1} if cut.site.layer == layer + 1 and cut.site.point == "mid" else set()
                    if decoder_requests.layer_and_rope(spec)[1]:
                        record.add(layer)
            before = decoder_requests.layer_before(cut.site, layers)
            if "previous_hidden" in names and before is not None:
                entered.add(before)
            embeds = embeds or "text" in names
            kernels = kernels or "forward" in names
            positions = positions or bool(names & {"positions", "rotary"})
        entered |= read
        layers_of = (frozenset(record), frozenset(read), frozenset(entered), frozenset(behind))
        return cls(*layers_of, embeds, kernels, positions)

    def check_version(self) -> None:
        """Raise Unsupported where something reads attention, which this version of transformers does not show."""
        if self.kernels:
            method()


def _named(cut: Cut) -> frozenset[str]:
    names = (*table.OF_DECODER_LAYERS, "previous_hidden", "forward", "text", "positions", "rotary")
    return frozenset(name for name in names if cut.stage.asks_for(name))


@dataclass
class Run:
    """One layer of the prefill: what it got, and its attention while it ran or, where that showed only a part, again.

    hidden: physical states (B, K, H). layout: their tokens, None: all. counts, lengths: visual and all tokens of rows.
    """

    aside: Aside
    number: int
    hidden: Tensor
    counts: tuple[int, ...]
    lengths: tuple[int, ...]
    record: Record | None = None

    @property
    def layout(self) -> Layout | None:
        """Of the tokens that it ran on; None: all."""
        return self.aside.layout


@dataclass
class Readings:
    """What one prompt batch has shown so far, as far as its pipeline needs it. Lives as long as the prefill."""

    state: BatchState
    needs: Needs
    embeds: Tensor | None = None
    runs: dict[int, Run] = field(default_factory=dict)
    # By kind of layer, such as `sliding_attention`, where one that has run got its arguments.
    heres: dict[str | None, Here] = field(default_factory=dict)

    def begin(self, embeds: Tensor) -> None:
        """Take the prompt's embeddings, float (B, S, H), before anything is cut."""
        if self.needs.embeds:
            self.embeds = main_stream(embeds, self.state.parts.stream)

    def finish(self) -> None:
        """Let go of the tensors: the prefill is over. What a layer was called with refers to the pass, and the pass to
        these readings, so that without this they would wait for the garbage collector.
        """
        self.embeds = None
        self.runs.clear()
        self.heres.clear()

    @contextmanager
    def recording(self, here: Here, hidden: Tensor) -> Iterator[None]:
        """Within the block, decoder layer `here.number` runs on physical states (B, K, H)."""
        state, number = self.state, here.number
        if not (state.has_visual and (self.needs.kernels or self.needs.entered)):
            yield
            return
        self.heres[self.kind(number)] = here
        for earlier in [n for n in self.runs if n < number - (number in self.needs.behind)]:
            del self.runs[earlier]
        if number not in self.needs.entered:
            yield
            return
        run = self.runs[number] = Run(Aside(here, state.layout, number), number, hidden, state.counts, state.lengths)
        actions = set(state.actions(number))
        if number not in self.needs.recorded or len(actions) > 1 or not actions <= WHOLE:
            yield
            return
        with recorded(Record(self.attention_of(number))) as run.record:
            yield

    def check_plans(self) -> None:
        """Raise Unsupported when a router leaves out a layer whose attention is read."""
        for number in sorted(self.needs.read) if self.state.has_visual else ():
            if any(not action.attends for action in self.state.actions(number)):
                raise Unsupported(
                    f"a stage reads the attention of layer {number}, which a router skips for some sample; "
                    "let the router keep that layer, or move the stage"
                )

    def attention_of(self, number: int) -> nn.Module:
        """The attention module of a decoder layer."""
        return self.state.parts.mixing(number)

    def kind(self, number: int) -> str | None:
        """Layers of one kind get the same masks and rotations; None where a decoder has one kind only."""
        kinds = getattr(getattr(self.state.parts.text, "config", None), "layer_types", None)
        return None if kinds is None else kinds[number]

    def run_aside(self, here: Here, number: int, hidden: Tensor) -> Run:
        """A call of decoder layer `number` on the tokens of now, with physical states (B, K, H), that is still to be
        made. Raises Unsupported if the layer's arguments are not known yet.
        """
        kind, state = self.kind(number), self.state
        like = here if self.kind(here.number) == kind else self.heres.get(kind)
        if like is None:
            raise Unsupported(f"layer {number} cannot be looked at yet: no layer of its kind, {kind}, has run before")
        return Run(Aside(like, state.layout, number), number, hidden, state.counts, state.lengths)

    def attended(self, spec: decoder_requests.Spec, at: Here, cut: Cut, hidden: Tensor) -> tuple[Attended, Run]:
        """What `spec` reads: the attention of a layer that has run, or, looking ahead, of one that would run next on
        physical states (B, K, H).
        """
        parts = self.state.parts
        number = decoder_requests.layer_of(spec.layer, cut.site, self.state.bound.shape.layers)
        assert number is not None, "checked by Needs.of"
        run = self.run_aside(at, number, hidden) if spec.layer == "next" else self.runs[number]
        _, rope = decoder_requests.layer_and_rope(spec)
        if run.record is not None and rope:
            # A cache of fixed size gives all its keys; the empty ones stand behind those that ran.
            return run.record.result.narrowed(run.hidden.shape[1]), run
        return aside.attended(run.aside, parts.layers[number], self.attention_of(number), run.hidden, rope), run

    def prompt_tokens(self) -> PromptTokens:
        """What a strategy's own function may know of the prompt: copies, which it cannot harm."""
        prompt = self.state.prompt
        assert self.embeds is not None, "kept if Needs.embeds"
        live = (prompt.ids, self.embeds.detach(), prompt.real, prompt.visual, self.state.text, self.state.text_after)
        return PromptTokens(*(one.clone() for one in live))

    def queries(self, spec: Rows, run: Run) -> tuple[Tensor, Tensor]:
        """The query slots of a layer that `spec` takes: int64 (B, Q), and bool (B, Q), False on padding."""
        prompt, layout = self.state.prompt, run.layout
        if spec.queries == "last":
            slots = prompt.last if layout is None else torch.full_like(prompt.last, layout.width - 1)
            return slots[:, None], torch.ones_like(slots, dtype=torch.bool)[:, None]
        mask = self._asked(spec)
        alive = mask if layout is None else layout.gather(mask) & layout.present
        on_host = {"all": run.lengths, "visual": run.counts, "text": _differences(run.lengths, run.counts)}
        numbers = on_host.get(spec.queries) if isinstance(spec.queries, str) else None
        slots = leftmost(alive, max(*(alive.sum(1).tolist() if numbers is None else numbers), 1))
        return slots, alive.gather(1, slots)

    def _asked(self, spec: Rows) -> Tensor:
        """The tokens whose rows `spec` takes, bool (B, S)."""
        prompt = self.state.prompt
        if callable(spec.queries):
            mask = spec.queries(self.prompt_tokens())
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != prompt.ids.shape:
                got = (mask.dtype, tuple(mask.shape)) if isinstance(mask, Tensor) else type(mask).__name__
                raise PluginError(f"Rows(queries=...) must return bool {tuple(prompt.ids.shape)}, not {got}")
            return mask.to(prompt.ids.device) & prompt.real
        state = self.state
        masks = {"text": state.text, "after": state.text_after, "visual": prompt.visual, "all": prompt.real}
        return masks[spec.queries]

    def columns(self, run: Run, positions: Tensor) -> Tensor:
        """The slots of a layer that hold logical `positions`, int64 (B, V)."""
        return positions if run.layout is None else run.layout.slot_of().gather(1, positions)

    def rows(self, states: Attended, run: Run, spec: Rows, tokens: SiteTokens) -> Tensor:
        """The rows that `spec` describes of one call of a layer, for the visual `tokens`, as the input `attention`."""
        device = states.query.device
        if spec.undecay:
            states = replace(states, phases=aside.phases(run.aside, run.hidden, states.query.shape[-1]).to(device))
        slots, valid = self.queries(spec, run)
        columns = self.columns(run, tokens.positions)
        rows = attention(
            states, slots.to(device), valid.to(device), self.visual(run).to(device), columns.to(device), spec
        )
        return blank(rows, tokens.valid)

    def visual(self, run: Run) -> Tensor:
        """The slots of a layer that hold visual tokens, bool (B, K)."""
        visual = self.state.prompt.visual
        return visual if run.layout is None else run.layout.gather(visual) & run.layout.present


def _differences(lengths: tuple[int, ...], counts: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(length - count for length, count in zip(lengths, counts, strict=True))


def taken(states: Tensor, slots: Tensor, valid: Tensor) -> Tensor:
    """Entries of states (B, K, H) at `slots`, int64 (B, V), zeros where not `valid`: (B, V, H)."""
    return blank(take(states, slots, 1), valid)
