"""`apply`: put a pipeline on an unmodified model for the length of a `with` block."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prunekit import families
from prunekit.decisions import LayerAction
from prunekit.engine import kv
from prunekit.engine.call import CALL, Call, mark
from prunekit.engine.observers import tell
from prunekit.engine.overrides import Overrides, is_overridden
from prunekit.engine.probes import SUPPORTED, wraps
from prunekit.engine.session import STEP, Session, Step, attend, reading_layers
from prunekit.errors import Unsupported
from prunekit.families.base import Parts
from prunekit.pipeline import BoundPipeline, Pipeline, build
from prunekit.report import RunReport


@contextmanager
def apply(
    model: PreTrainedModel, pipeline: Pipeline | str | Path | Mapping[str, Any], overrides: Sequence[str] = ()
) -> Iterator[Attached]:
    """Within the block, `model` really drops the tokens and skips the layers that `pipeline` says.

    pipeline: a `Pipeline`, or anything that `prunekit.load` takes. overrides: `key=value` strings, as for `load`.
    Yields an `Attached`, whose `report` tells what the newest prompt batch did. On leaving, also by an exception, the
    model is as it was, bit for bit. Raises SpecError for a pipeline that is wrong or does not fit the model,
    Unsupported for a model or a call that cannot be pruned exactly; both before any compute.
    """
    attached = Attached(model, pipeline if isinstance(pipeline, Pipeline) else build(pipeline, overrides))
    attached.attach()
    try:
        yield attached
    finally:
        attached.detach()


class Attached:
    """A pipeline on a model. Made by `apply`."""

    def __init__(self, model: PreTrainedModel, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self.parts: Parts = families.find(model)
        self.bound: BoundPipeline = pipeline.bind(self.parts.shape())
        self._newest: Session | None = None
        self._report: tuple[Session, RunReport] | None = None
        self._overrides = Overrides()

    @property
    def report(self) -> RunReport | None:
        """What the newest prompt batch did; None before the first. Reads tensors back from their device."""
        if self._newest is None:
            return None
        if self._report is None or self._report[0] is not self._newest:
            self._report = self._newest, self._newest.report()
        return self._report[1]

    def attach(self) -> None:
        """Put the overrides in. Raises Unsupported if the model already carries a pipeline."""
        parts = self.parts
        if is_overridden(parts.base, "forward"):
            raise Unsupported(
                "this model is already inside a prunekit.apply block; leave it first, "
                "or put both sets of stages into one pipeline"
            )
        self._check_attention()
        replace = self._overrides.replace
        try:
            replace(parts.base, "forward", self._base_forward)
            replace(parts.base, "get_image_features", self._encode)
            replace(parts.text, "forward", self._text_forward)
            if self.active:
                self._attach_layers()
        except BaseException:
            self.detach()
            raise

    @property
    def active(self) -> bool:
        """Whether the pipeline changes anything; one that does not leaves the layers alone."""
        return bool(self.bound.token_stages or self.bound.plan.actions)

    def _attach_layers(self) -> None:
        replace, parts = self._overrides.replace, self.parts
        reads = reading_layers(self.bound)
        if reads:
            wraps.acquire()
            self._overrides.later(wraps.release)
        for number, layer in enumerate(parts.layers):
            replace(layer, "forward", _layer_forward(number))
            action = self.bound.plan[number]
            if number + 1 in reads or action is LayerAction.SKIP_ATTENTION:
                replace(getattr(layer, parts.attention), "forward", _attention_forward(number))
            if action is LayerAction.SKIP_MLP:
                replace(getattr(layer, parts.mlp), "forward", _mlp_forward)

    def detach(self) -> None:
        """Take the overrides out; the model is as it was."""
        self._overrides.restore()

    def _check_attention(self) -> None:
        used = self.parts.attention_implementation
        if self.active and used not in SUPPORTED:
            raise Unsupported(
                f"attention implementation '{used}' is not supported by this version; load the model with "
                f"attn_implementation={' or '.join(map(repr, SUPPORTED))}"
            )

    def _encode(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Note the image features that a call of the base model encodes (`generate` encodes before it calls)."""

        def get_image_features(*args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            pixels = kwargs.get("pixel_values", args[0] if args else None)
            features = getattr(output, "pooler_output", None)
            if self._needs_seed:
                mark(features, pixels)
            if (call := CALL.get()) is not None:
                call.features = features
            return output

        return get_image_features

    @property
    def _needs_seed(self) -> bool:
        return any(stage.asks_for("seed") for _, stage in self.bound.token_stages)

    def _base_forward(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Remember the prompt's ids and images while the LVLM's base model runs."""
        signature = inspect.signature(original)

        def forward(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind_partial(*args, **kwargs).arguments
            given = given | given.get("kwargs", {})
            encoded = (given.get("mm_encoder_outputs") or {}).get("image")
            call = Call(given, getattr(encoded, "pooler_output", None))
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
            call, cache = CALL.get(), kwargs.get("past_key_values")
            session: Session | None = kv.owner_of(cache)
            filled = cache is not None and cache.get_seq_length() > 0
            if not self.active and (call is None or call.given.get("input_ids") is None or filled):
                # Nothing to change, and nothing to report of decoding steps or of prompts without ids.
                return original(*args, **kwargs)
            if call is None:
                raise Unsupported(
                    "the decoder was called by itself; call the LVLM, which knows where the visual tokens are"
                )
            embeds = kwargs["inputs_embeds"]
            if session is not None:
                session.refuse_other(self.pipeline, self.parts)
                call.refuse_new_images()
            prefill = session is None
            session = session or Session(self.bound, self.parts, call.prompt(self.parts), embeds.element_size())
            additive = self.parts.attention_implementation == "eager"
            token = STEP.set(Step(session, prefill, embeds.shape[1], additive))
            try:
                output = original(*args, **kwargs)
            finally:
                STEP.reset(token)
            return self._finish(session, output) if prefill else output

        return forward

    def _finish(self, session: Session, output: Any) -> Any:
        self._newest = session
        if session.layout is not None:
            output["last_hidden_state"] = session.layout.expand(output["last_hidden_state"])
        tell(lambda: self.report or session.report())
        return output


def _layer_forward(number: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            step = STEP.get()
            if step is None:
                return original(hidden_states, *args, **kwargs)
            if args:
                raise Unsupported(
                    "decoder layers are called with positional arguments; this transformers version is not supported"
                )
            return step.run_layer(number, original, hidden_states, kwargs)

        return forward

    return make


def _attention_forward(number: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            step = STEP.get()
            return original(*args, **kwargs) if step is None else attend(step, number, original, args, kwargs)

        return forward

    return make


def _mlp_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if STEP.get() is None:
            return original(hidden_states, *args, **kwargs)
        return torch.zeros_like(hidden_states)

    return forward
