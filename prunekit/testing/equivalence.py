"""`assert_equivalent`: one call that proves a pipeline exact on a model, for authors of strategies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import prunekit
from prunekit import Pipeline, Selection, hookimpl
from prunekit.testing.oracle import MaskedReference, Merge
from prunekit.testing.precision import Float64Throughout

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from prunekit.report import RunReport

RECORDER = "prunekit-testing-recorder"


@dataclass(frozen=True)
class Equivalence:
    """A pruned run beside its reference.

    sequences: int64 (B, P + T), prompt and decoded tokens. logits, reference: float64 (B, T, vocabulary).
    error: the largest absolute difference of the two. cache: the KV cache that the run left behind.
    """

    report: RunReport
    sequences: Tensor
    logits: Tensor
    reference: Tensor
    error: float
    cache: Any


def assert_equivalent(
    model: PreTrainedModel,
    pipeline: Pipeline | Mapping[str, Any] | Path | str,
    inputs: Mapping[str, Tensor],
    steps: int = 8,
    atol: float = 1e-9,
    merges: Callable[[RunReport], Mapping[int, Merge]] | None = None,
) -> Equivalence:
    """Prefill and `steps` decode steps of the pruned model equal the masked reference; AssertionError if they do not.

    The pruned model decodes greedily with its cache; the reference is given the same tokens, replays the decisions of
    the run's report on the full sequence, and every logit is compared.

    model: a stock model in float64 and eval mode, sdpa or eager. Both sides run under `Float64Throughout`, which takes
        out the places where a float64 model still rounds to float32 (RMSNorm, eager softmax, generate's logits);
        without it the floor would be 1e-7.
    inputs: `input_ids`, `attention_mask` (B, P), left-padded, `pixel_values`; `prunekit.testing.tiny` makes some.
    merges: how events merged, from the report alone: an independent statement of the strategy's rule. None takes the
        weights that the strategy returned to the engine, so that only their application is checked.
    Raises ValueError when the model is not in float64.
    """
    if model.dtype != torch.float64:
        raise ValueError(f"the model is in {model.dtype}; equality to {atol} needs float64: model.double()")
    built = pipeline if isinstance(pipeline, Pipeline) else prunekit.load(pipeline)
    with Float64Throughout():
        with recorded(built) as record, prunekit.apply(model, built) as run:
            output = generate(model, inputs, max_new_tokens=steps + 1)
        if run.report is None:
            raise AssertionError("the run left no report")
        stated = merges(run.report) if merges else record.merges(run.report)
        logits = torch.stack(output.logits, dim=1)
        tokens = output.sequences[:, inputs["input_ids"].shape[1] :]
        reference = MaskedReference(model, inputs, run.report, stated).logits(tokens)
    difference = (logits - reference).abs().nan_to_num(torch.inf)
    error = float(difference.max())
    if error > atol:
        worst = difference.amax(-1)
        row, step = divmod(int(worst.argmax()), worst.shape[1])
        raise AssertionError(
            f"pipeline {built.name}: logits differ from the masked reference by {error:.3g} (allowed {atol:.3g}), most "
            f"in row {row} at {'prefill' if step == 0 else f'decode step {step}'}; per row and step:\n{worst}\n"
            f"{run.report}"
        )
    return Equivalence(run.report, output.sequences, logits, reference, error, output.past_key_values)


def generate(model: PreTrainedModel, inputs: Mapping[str, Tensor], **options: Any) -> Any:
    """`model.generate`, greedy unless `options` say otherwise, to its full length, with raw logits and the cache."""
    call: Any = model.generate
    length = options["max_new_tokens"]
    defaults = {"do_sample": False, "min_new_tokens": length, "return_dict_in_generate": True, "output_logits": True}
    return call(**inputs, **(defaults | options))


class Recorder:
    """Wraps the token hooks of every stage of a pipeline and notes the merge weights that the strategies return."""

    def __init__(self) -> None:
        self.calls: dict[int, list[tuple[Tensor, Tensor | None]]] = {}

    def merges(self, report: RunReport) -> dict[int, Merge]:
        """The merges of the one prompt batch that ran while recording, as `MaskedReference` takes them."""
        found: dict[int, Merge] = {}
        before: tuple[Sequence[int], ...] = tuple(range(count) for count in report.visual_tokens)
        for number, event in enumerate(report.events):
            rows = _per_sample(self.calls[sorted(self.calls)[number]], event.entered)
            if any(weights is not None for weights in rows):
                chosen = [[old.index(one) for one in new] for old, new in zip(before, event.kept, strict=True)]
                found[number] = tuple(
                    torch.eye(many)[keep] if weights is None else weights[keep]
                    for weights, keep, many in zip(rows, chosen, event.entered, strict=True)
                )
            before = event.kept
        return found

    def wrapper(self, stage: int) -> object:
        """A plugin for the manager of stage number `stage`."""
        calls = self.calls.setdefault(stage, [])

        class Wrapper:
            @hookimpl(wrapper=True)
            def select_tokens(self, valid: Tensor) -> Any:
                result = yield
                calls.append((valid, result.weights if isinstance(result, Selection) else None))
                return result

            @hookimpl(wrapper=True)
            def merge_tokens(self, valid: Tensor) -> Any:
                weights = yield
                if weights is not None:
                    calls[-1] = (valid, weights)
                return weights

        return Wrapper()


def _per_sample(calls: Sequence[tuple[Tensor, Tensor | None]], entered: Sequence[int]) -> list[Tensor | None]:
    """The weights of each sample, (entered, entered), from one call a batch or one call a sample."""
    found: list[Tensor | None] = []
    for valid, weights in calls:
        for row, present in enumerate(valid.reshape(-1, valid.shape[-1])):
            square = None if weights is None else weights.reshape(-1, *weights.shape[-2:])[row]
            found.append(None if square is None else square[present][:, present])
    if len(found) == len(entered):
        return found
    # A strategy that takes one sample at a time is not asked about samples without visual tokens.
    asked = iter(found)
    return [next(asked) if count else None for count in entered]


@contextmanager
def recorded(pipeline: Pipeline) -> Iterator[Recorder]:
    """Record the merges of a pipeline's token stages while this is open."""
    recorder = Recorder()
    stages = [stage for stage in pipeline.stages if stage.is_token]
    for stage in stages:
        stage.manager.register(recorder.wrapper(stage.index), name=RECORDER)
    try:
        yield recorder
    finally:
        for stage in stages:
            stage.manager.unregister(name=RECORDER)
