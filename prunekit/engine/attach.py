"""A pipeline on an unmodified model for the length of a `with` block."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import nn
from transformers import PreTrainedModel

from prunekit.engine.cache import ragged, static
from prunekit.engine.decoder import layers
from prunekit.engine.decoder.decoding import Decoding, passing
from prunekit.engine.decoder.forward_pass import CURRENT, ForwardPass
from prunekit.engine.decoder.prefill import Prefill
from prunekit.engine.decoder.readings import Needs
from prunekit.engine.decoder.state import BatchState
from prunekit.engine.observers import tell
from prunekit.engine.overrides import Overrides
from prunekit.engine.prompt import generate
from prunekit.engine.prompt.call import CALL, Call
from prunekit.engine.prompt.visual_inputs import VisualInputs, counts_of, record_on
from prunekit.engine.summary import summarise
from prunekit.engine.tokens import masks
from prunekit.engine.tower import blocks
from prunekit.engine.tower.needs import TowerNeeds
from prunekit.engine.tower.record import TowerRecord, tower_events, tower_tokens, tower_works
from prunekit.errors import Unsupported
from prunekit.families.base import Modality, Parts
from prunekit.pipeline.build import BoundPipeline, Pipeline, combine
from prunekit.records import RunReport
from prunekit.upstream import CACHE, todays_names

_ATTACHED = "__prunekit_attached__"


class Attached:
    """A pipeline on a model, from entering this context to leaving it: `with Attached(model, pipeline, parts) as run`.

    parts: those of `model`, of a known family or proved. processor: the model's, for hooks that read the prompt as
    text; None: no hook can. observed: whether observers are told of its runs.
    Raises SpecError for a pipeline that does not fit the model.
    """

    def __init__(
        self, model: PreTrainedModel, pipeline: Pipeline, parts: Parts, processor: Any = None, observed: bool = True
    ) -> None:
        self.model, self.parts, self.processor, self.observed = model, parts, processor, observed
        self.outer: Attached | None = self.parts.base.__dict__.get(_ATTACHED)
        shape = self.parts.shape()
        self.pipeline = pipeline if self.outer is None else combine(self.outer.pipeline, pipeline, shape.layers)
        self.bound: BoundPipeline = self.pipeline.bind(shape)
        self._check_processor()
        # One that changes nothing leaves the layers alone.
        self.active = self.bound.acts
        self.needs = Needs.of(self.bound)
        self._kind: masks.Kind | None = masks.kind_of(self.parts.attention_implementation)
        windows = [getattr(getattr(layer, self.parts.attention), "sliding_window", None) for layer in self.parts.layers]
        self._window: int | None = min((window for window in windows if window), default=None)
        self._newest: BatchState | None = None
        self._report: tuple[BatchState, RunReport] | None = None
        self._overrides = Overrides()
        self._detached = False
        self._tower = TowerNeeds.of(self.bound, self.parts)

    def __enter__(self) -> Self:
        self.attach()
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def __deepcopy__(self, memo: object) -> Attached:
        """What is on a model is bound to it: a copy would go on to run the modules of the original."""
        raise Unsupported("a model inside a prunekit.apply block cannot be copied; do it outside of the block")

    @property
    def report(self) -> RunReport | None:
        """What the newest prompt batch did; None before the first. Reads tensors back from their device."""
        if self._newest is None:
            return None
        if self._report is None or self._report[0] is not self._newest:
            self._report = self._newest, report_of(self._newest)
        return self._report[1]

    def attach(self) -> None:
        """Put the overrides in."""
        parts, base = self.parts, self.parts.base
        if self.outer is not None:
            self.outer._overrides.restore()
        try:
            self._put_in(parts)
        except BaseException:
            self.detach()
            raise
        base.__dict__[_ATTACHED] = self

    def _check_processor(self) -> None:
        reading = [stage.label for stage in self.pipeline.stages if stage.asks_for("question")]
        if reading and self.processor is None:
            raise Unsupported(
                f"{reading[0]} asks for `question`, the user's words, which only the model's processor can read from "
                "the prompt: apply(model, pipeline, processor=processor)"
            )

    def _put_in(self, parts: Parts) -> None:
        replace = self._overrides.replace
        replace(parts.base, "forward", self._base_forward)
        for modality in parts.modalities:
            replace(parts.base, modality.method, self._encode(modality))
        replace(parts.text, "forward", self._text_forward)
        if self.active:
            generate.override(self._overrides, self.model)
            if self.pipeline.positions == "renumber" or self.needs.positions:
                replace(_rotary(parts), "forward", layers.rotary_forward)
            layers.override(self._overrides, parts, self.bound)
            self.needs.check_version()
        if self._tower is not None:
            blocks.override(self._overrides, self._tower)

    def detach(self) -> None:
        """Take the overrides out; the model is as it was, or as the outer block has it."""
        self._detached = True
        if self.parts.base.__dict__.get(_ATTACHED) not in (self, self.outer, None):
            return  # an inner block has outlived this one; it acts for both, and will not put this one back
        self.parts.base.__dict__.pop(_ATTACHED, None)
        try:
            self._overrides.restore()
        finally:
            static.forget(self.model)
            outer, self.outer = self.outer, None
            while outer is not None and outer._detached:
                outer = outer.outer
            if outer is not None:
                outer._put_in(outer.parts)
                outer.parts.base.__dict__[_ATTACHED] = outer

    def _check_window(self, tokens: int, cache: Any) -> None:
        """Flash kernels count a sliding window in the tokens they get, not in those of the prompt."""
        if self._kind != "flat" or self._window is None:
            return
        length = tokens + (0 if cache is None else cache.get_seq_length())
        if length > self._window:
            raise Unsupported(
                f"{length} tokens are more than the sliding window of {self._window}, which flash attention would "
                "count in kept tokens; load the model with attn_implementation='sdpa'"
            )

    def _encode(self, modality: Modality) -> Callable[..., Any]:
        """Record what a method of the base model encodes (`generate` encodes before it calls the model)."""

        def make(original: Callable[..., Any]) -> Callable[..., Any]:
            signature = inspect.signature(original)

            def encode(*args: Any, **kwargs: Any) -> Any:
                if torch.compiler.is_compiling() and self.active:
                    static.require(None)
                if blocks.running():  # a method for videos that calls the one for images
                    return original(*args, **kwargs)
                given = signature.bind_partial(*args, **kwargs).arguments
                given |= given.pop("kwargs", {})

                def run(arguments: Mapping[str, Any]) -> Any:
                    return original(*args, **kwargs) if arguments is given else original(**arguments)

                output, record = self._encoded(modality, given, run)
                features = getattr(output, "pooler_output", None)
                if features is not None:
                    record_on(output, VisualInputs(modality, given, counts_of(features), record))
                if (call := CALL.get()) is not None:
                    call.outputs[modality.name] = output
                return output

            return encode

        return make

    def _encoded(
        self, modality: Modality, arguments: dict[str, Any], original: Callable[[Mapping[str, Any]], Any]
    ) -> tuple[Any, TowerRecord | None]:
        if self._tower is None or (torch.compiler.is_compiling() and not self.active):
            return original(arguments), None
        return blocks.encode(self._tower, modality, arguments, original)

    def _base_forward(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Remember the prompt's ids and visual inputs while the LVLM's base model runs."""
        names = list(inspect.signature(original).parameters)

        def forward(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():  # a decoding step, or `_text_forward` refuses it
                return original(*args, **kwargs)
            if not self.active and ragged.is_filled(kwargs.get(CACHE)):
                return original(*args, **kwargs)  # nothing to change, and nothing to report of decoding steps
            call = Call(todays_names(dict(zip(names, args, strict=False)) | kwargs), self.parts)
            if self.active:
                call.refuse_unsupported()
            token = CALL.set(call)
            try:
                return original(*args, **kwargs)
            finally:
                CALL.reset(token)

        return forward

    def _text_forward(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Open a step around the decoder stack; after a prefill, give its output the logical length again."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            cache = kwargs.get(CACHE)
            if torch.compiler.is_compiling():
                if self.active:
                    static.require(cache)
                return original(*args, **kwargs)
            call = CALL.get()
            if not self.active and (call is None or call.given.get("input_ids") is None):
                return original(*args, **kwargs)  # nothing to report of prompts without ids
            if call is None:
                raise Unsupported(
                    "the decoder was called by itself; call the LVLM, which knows where the visual tokens are"
                )
            embeds, kind = kwargs["inputs_embeds"], self._kind or "bool"
            state: BatchState | None = ragged.owner_of(cache)
            if state is not None:
                state.refuse_other(self.pipeline.sha, self.parts)
                call.refuse_new_inputs()
            self._check_window(embeds.shape[1], cache)
            if state is None:
                state = BatchState(self.bound, self.parts, call.prompt(), embeds.element_size(), self.processor)
                prefill = Prefill(state, embeds.shape[1], kind, needs=self.needs)
                return self._finish(prefill, _within(prefill, original, args, kwargs))
            decoding = Decoding(state, embeds.shape[1], kind, passing=state.passing)
            return _within(decoding, original, args, kwargs)

        return forward

    def _finish(self, prefill: Prefill, output: Any) -> Any:
        state = self._newest = prefill.state
        last, cache = output["last_hidden_state"], output.get(CACHE)  # a decoder that got no cache may have made one
        if state.layout is not None and len(self.parts.layers) <= self.parts.logical_until:
            last = state.layout.gather(last)  # the loop wanted logical states to the very end
        elif state.layout is not None:
            output["last_hidden_state"] = state.layout.expand(last)
        if self.active:
            prefill.end(last, cache)
            state.passing = passing(cache)
            static.seal(cache)
        if self.observed:
            tell(lambda: self.report or report_of(state))
        return output


def _within(current: ForwardPass, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call the decoder with `current` as the pass that its layers belong to."""
    token = CURRENT.set(current)
    try:
        return original(*args, **kwargs)
    finally:
        CURRENT.reset(token)


def report_of(state: BatchState) -> RunReport:
    """What the prefill of a prompt batch did; reads the decisions back from their device."""
    layers = state.bound.shape.layers
    every = [state.lengths] * layers
    return summarise(
        state.bound,
        state.plans,
        prompt_tokens=state.prompt.lengths,
        visual_tokens=state.prompt.visual_counts,
        kept_tokens=state.counts,
        events=(*tower_events(state.prompt), *(decision.event() for decision in state.decisions)),
        layer_tokens=_by_row(state.layer_tokens or every),
        layer_visual=_by_row(state.layer_visual or [state.counts] * layers),
        mlp_tokens=_by_row(state.mlp_tokens or every),
        notes=tuple(state.notes),
        tower_tokens=tower_tokens(state.prompt),
        works=tower_works(state.prompt),
        itemsize=state.itemsize,
    )


def _by_row(layers: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
    return tuple(zip(*layers, strict=True))


def _rotary(parts: Parts) -> nn.Module:
    assert parts.rotary is not None, "checked when the pipeline was bound"
    module: nn.Module = getattr(parts.text, parts.rotary)
    return module
