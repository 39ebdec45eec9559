"""A pipeline on an unmodified model for the length of a `with` block."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import nn
from transformers import PreTrainedModel

from prunekit.engine.cache import ragged, static
from prunekit.engine.calibrated import check_calibration
from prunekit.engine.callers import Callers
from prunekit.engine.decoder import around, layers, logits
from prunekit.engine.decoder.decoding import Decoding, passing
from prunekit.engine.decoder.forward_pass import CURRENT, ForwardPass
from prunekit.engine.decoder.prefill import Prefill
from prunekit.engine.decoder.readings import Needs
from prunekit.engine.decoder.state import BatchState
from prunekit.engine.keep_maps import trace_of
from prunekit.engine.observers import tell
from prunekit.engine.overrides import Overrides
from prunekit.engine.prompt import fit, generate, lengths
from prunekit.engine.prompt.call import CALL, Call
from prunekit.engine.prompt.visual_inputs import ENCODES, VisualInputs, counts_of, record_on
from prunekit.engine.reporting import report_of
from prunekit.engine.tokens import masks
from prunekit.engine.tower import blocks
from prunekit.engine.tower.needs import TowerNeeds
from prunekit.engine.tower.record import TowerRecord
from prunekit.engine.tracing import REASON, traced_step, untraced
from prunekit.errors import InputError, PrunekitError, Unsupported
from prunekit.families.base import Modality, Parts
from prunekit.pipeline.build import BoundPipeline, Pipeline, combine
from prunekit.records import RunReport, Trace
from prunekit.upstream import CACHE, Encoder, todays_names

_ATTACHED = "__prunekit_attached__"
# Held while blocks are put on a model or taken off: threads may do so at once.
_LOCK = threading.RLock()


class Attached:
    """A pipeline on a model, from entering this context to leaving it: `with Attached(model, pipeline, parts) as run`.

    parts: those of `model`, of a known family or proved. processor: the model's, for hooks that read the prompt as
    text; None: no hook can. observed: whether observers are told of its runs. shared: whether calls of all threads and
    tasks are meant, not only those of the one that enters, and of what it starts inside. trace: whether `trace` is.
    Raises SpecError for a pipeline that does not fit the model, Unsupported inside a block that is not the caller's.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        pipeline: Pipeline,
        parts: Parts,
        processor: Any = None,
        observed: bool = True,
        shared: bool = False,
        trace: bool = False,
    ) -> None:
        self.model, self.parts, self.processor, self.observed = model, parts, processor, observed
        self.traced = trace
        self.callers = Callers(shared)
        self.outer: Attached | None = self.parts.base.__dict__.get(_ATTACHED)
        if self.outer is not None:
            self.outer.callers.check_block()
        shape = self.parts.shape()
        self.pipeline = pipeline if self.outer is None else combine(self.outer.pipeline, pipeline, shape)
        self.bound: BoundPipeline = self.pipeline.bind(shape)
        self._check_processor()
        check_calibration(self.bound, self.model)
        # One that changes nothing leaves the layers alone.
        self.active = self.bound.acts
        self.needs = Needs.of(self.bound)
        self._kind: masks.Kind | None = masks.kind_of(self.parts.attention_implementation)
        self._check_positions()
        self._window = lengths.window_of(parts) if self._kind == "flat" else None
        self._newest: BatchState | None = None
        self._report: tuple[BatchState, int, RunReport] | None = None
        self._overrides = Overrides()
        self._detached = False
        self._tower = TowerNeeds.of(self.bound, self.parts, trace)

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
        if self._report is None or self._report[:2] != (self._newest, self._newest.looks):
            self._report = self._newest, self._newest.looks, report_of(self._newest)
        return self._report[2]

    @property
    def needs_pixels(self) -> bool:
        """Whether stages cut or read the vision tower or resize images: features encoded before would not do."""
        return self._tower is not None and self._tower.asks

    @property
    def trace(self) -> Trace | None:
        """What became of every visual token of the newest prompt batch; None before the first. As `report`.

        Raises InputError where no trace was asked for.
        """
        if not self.traced:
            raise InputError("nothing was traced: ask for it before the model runs, with apply(..., trace=True)")
        report = self.report
        return None if report is None or self._newest is None else trace_of(self._newest, report)

    def attach(self) -> None:
        """Put the overrides in. Raises Unsupported where another thread has just put in others."""
        parts, base = self.parts, self.parts.base
        with _LOCK:
            if (newer := base.__dict__.get(_ATTACHED)) is not None:
                newer.callers.check_block()
            if self.outer is not None:
                self.outer._overrides.restore()
            try:
                self._put_in(parts)
            except BaseException:
                self.detach()
                raise
            base.__dict__[_ATTACHED] = self
            self.callers.open()

    def _refuse_change(self, error: Exception | None = None) -> None:
        """Raise Unsupported where the overrides have been changed while a call ran, which may have met both."""
        if self.parts.base.__dict__.get(_ATTACHED) is not self:
            raise Unsupported(
                "a prunekit.apply block was opened or left on this model while a call of it ran in another thread; "
                "let calls end (thread.join()) before"
            ) from error

    def _check_processor(self) -> None:
        reading = [stage.label for stage in self.pipeline.stages if stage.asks_for("question")]
        if reading and self.processor is None:
            raise Unsupported(
                f"{reading[0]} asks for `question`, the user's words, which only the model's processor can read from "
                "the prompt: apply(model, pipeline, processor=processor)"
            )

    def _check_positions(self) -> None:
        if self._kind == "flat" and self.bound.cuts and self.parts.reads_positions:
            raise Unsupported(
                f"the layers of {self.parts.family} need position ids, whose gaps flash attention would take for the "
                "borders of packed sequences; load the model with attn_implementation='sdpa' or 'eager'"
            )

    def _put_in(self, parts: Parts) -> None:
        replace = self._overrides.replace
        replace(parts.base, "forward", self._base_forward, traceable=True)
        replace(parts.base, "_replicate_for_data_parallel", _refuse_replicas)
        for modality in parts.modalities:
            replace(parts.base, modality.method, self._encode(modality), traceable=not self.active)
        replace(parts.text, "forward", self._text_forward, traceable=True)
        model: Any = self.model
        if (head := model.get_output_embeddings()) is not None:
            replace(head, "forward", logits.watched(parts.base), traceable=True)
        if self.active:
            generate.override(self._overrides, self.model)
            if parts.opaque is not None:
                around.check(parts)
            elif self.pipeline.positions == "renumber" or self.needs.positions:
                replace(_rotary(parts), "forward", layers.rotary_forward)
            layers.override(self._overrides, parts, self.bound, self.needs.read)
            self.needs.check_version()
        if self._tower is not None:
            blocks.override(self._overrides, self._tower)

    def detach(self) -> None:
        """Take the overrides out; the model is as it was, or as the outer block has it."""
        with _LOCK:
            self._detached = True
            self.callers.close()
            self._take_out()

    def _take_out(self) -> None:
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

    def _encode(self, modality: Modality) -> Callable[..., Any]:
        """Record what a method of the base model encodes (`generate` encodes before it calls the model)."""

        def make(original: Callable[..., Any]) -> Callable[..., Any]:
            encoder = Encoder(original, modality.pixels)

            def encode(*args: Any, **kwargs: Any) -> Any:
                # Traced only where nothing is pruned. One that encodes videos may call the one for images.
                if torch.compiler.is_compiling() or ENCODES.get():
                    return original(*args, **kwargs)
                if self._tower is not None and self._tower.asks:
                    self.callers.check_call()
                given = encoder.arguments(args, kwargs)

                def run(arguments: Mapping[str, Any]) -> Any:
                    return original(*args, **kwargs) if arguments is given else encoder(arguments)

                token = ENCODES.set(True)
                try:
                    return self._recorded(modality, given, run)
                except (ValueError, RuntimeError) as error:
                    fit.explain(error, modality, self.parts, self.processor)
                    raise
                finally:
                    ENCODES.reset(token)

            return encode

        return make

    def _recorded(self, modality: Modality, given: dict[str, Any], run: Callable[[Mapping[str, Any]], Any]) -> Any:
        """What `run` returns for these arguments, with a record on it of them, and of the tower."""
        output, record = self._encoded(modality, given, run)
        features = getattr(output, "pooler_output", None)
        if features is not None:
            counts = counts_of(modality.features(given, features))
            record_on(output, VisualInputs(modality, given, counts, record))
        if (call := CALL.get()) is not None:
            call.outputs[modality.name] = output
        return output

    def _encoded(
        self, modality: Modality, arguments: dict[str, Any], original: Callable[[Mapping[str, Any]], Any]
    ) -> tuple[Any, TowerRecord | None]:
        if self._tower is None or torch.compiler.is_compiling():
            return original(arguments), None
        return blocks.encode(self._tower, modality, arguments, original)

    def _base_forward(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Remember the prompt's ids and visual inputs while the LVLM's base model runs."""
        names = list(inspect.signature(original).parameters)

        @functools.wraps(original)  # `generate` reads off it what a model takes that is its own base
        def forward(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return self._compiling(forward, original, args, kwargs)
            if not self.active and (ragged.is_filled(kwargs.get(CACHE)) or not self.callers.include_current):
                return original(*args, **kwargs)  # nothing to change, and nothing to report of decoding steps
            call = Call(todays_names(dict(zip(names, args, strict=False)) | kwargs), self.parts)
            if self.active:
                self.callers.check_call()
                call.refuse_unsupported()
            token = CALL.set(call)
            try:
                return original(*args, **kwargs)
            except PrunekitError:
                raise
            except Exception:
                fit.check_counts(call, self.processor)  # for which the model has words of its own
                raise
            finally:
                CALL.reset(token)

        return forward

    def _text_forward(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Open a step around the decoder stack; after a prefill, give its output the logical length again."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return self._compiling(forward, original, args, kwargs)
            cache = kwargs.get(CACHE)
            call = CALL.get()
            if not self.active and (call is None or call.given.get("input_ids") is None):
                return original(*args, **kwargs)  # nothing to report of prompts without ids
            if call is None:
                self.callers.check_call()
                raise Unsupported(
                    "the decoder was called by itself; call the LVLM, which knows where the visual tokens are"
                )
            embeds, kind = kwargs["inputs_embeds"], self._kind or "bool"
            wanted = kwargs.get("logits_to_keep", 0)
            wanted = wanted if isinstance(wanted, int) and kind != "flat" else 0
            if self.active and wanted:  # layers are left out for the other tokens here, where they may be fewer
                kwargs["logits_to_keep"] = 0
            state: BatchState | None = call.owner if cache is call.given.get(CACHE) else ragged.owner_of(cache)
            if state is not None:
                state.refuse_other(self.pipeline.sha, self.parts)
                call.refuse_new_inputs()
            lengths.check_window(self._window, embeds.shape[1], cache)
            lengths.check_counted(self.parts if self.active else None, embeds.shape[1], cache)
            if state is None:
                state = self._begin(call, kwargs, wanted)
                prefill = Prefill(state, embeds.shape[1], kind, needs=self.needs)
                if self.parts.opaque is not None:
                    return self._finish(prefill, around.prefill(prefill, original, kwargs))
                return self._finish(prefill, self._within(prefill, original, args, kwargs))
            logits.ran(state)
            if self.parts.opaque is not None:
                return around.decode(state, original, kwargs, kind)
            decoding = Decoding(state, embeds.shape[1], kind, passing=state.passing)
            return self._within(decoding, original, args, kwargs)

        return forward

    def _begin(self, call: Call, kwargs: Mapping[str, Any], wanted: int) -> BatchState:
        """The state of a new prompt batch, from the arguments of the decoder's call. wanted: as in `BatchState`."""
        embeds, prompt = kwargs["inputs_embeds"], call.prompt()
        fit.check_counts(call, self.processor, sum(prompt.visual_counts))
        state = BatchState(self.bound, self.parts, prompt, embeds.element_size(), self.processor, self.traced)
        state.wanted = wanted
        state.note_length(embeds.shape[1], kwargs.get("position_ids"))
        return state

    def _compiling(self, forward: Any, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call that is traced: a decoding step on a static cache as it is, anything else with its graph broken."""
        if not self.active:
            return original(*args, **kwargs)
        if static.is_sealed(kwargs.get(CACHE)):
            return traced_step(original, *args, **kwargs)
        if torch.compiler.is_dynamo_compiling():
            return untraced(forward, *args, **kwargs)
        raise Unsupported(f"this call cannot be exported: {REASON}")

    def _within(self, current: ForwardPass, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the decoder with `current` as the pass that its layers belong to."""
        token = CURRENT.set(current)
        try:
            output = original(*args, **kwargs)
        except Exception as error:
            self._refuse_change(error)
            raise
        finally:
            CURRENT.reset(token)
        self._refuse_change()
        return output

    def _finish(self, prefill: Prefill, output: Any) -> Any:
        state = self._newest = prefill.state
        logits.ran(state)
        last, cache = output["last_hidden_state"], output.get(CACHE)  # a decoder that got no cache may have made one
        inside = self.parts.opaque is None
        if self.active and state.last_only is not None:
            output["last_hidden_state"] = state.last_logical(last)
        elif state.layout is not None and inside and len(self.parts.layers) <= self.parts.logical_until:
            last = state.layout.gather(last)  # the loop wanted logical states to the very end
        elif state.layout is not None:
            output["last_hidden_state"] = state.layout.expand(last)
        if self.active:
            prefill.end(last, cache)
            if inside:
                state.passing, state.alike = passing(cache), len(set(self.bound.shape.layer_kinds)) < 2
                static.seal(cache)
            else:
                around.finish(state, cache)
        if self.observed:
            tell(lambda: self.report or report_of(state))
        return output


def _refuse_replicas(original: Callable[..., Any]) -> Callable[..., Any]:
    """An override of what `torch.nn.DataParallel` calls to copy a module; a copy would run the original."""

    def replicate() -> Any:
        raise Unsupported(
            "DataParallel copies the model on every call, and the copies would run the original; give each GPU a "
            "process with a model of its own"
        )

    return replicate


def _rotary(parts: Parts) -> nn.Module:
    assert parts.rotary is not None, "checked when the pipeline was bound"
    module: nn.Module = getattr(parts.text, parts.rotary)
    return module
