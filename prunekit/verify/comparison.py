"""A pruned run beside the masked reference: every logit, every count, the cache, and the model before and after."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunekit.cost import stock_kv_tokens
from prunekit.engine.attach import Attached
from prunekit.families.base import Parts
from prunekit.pipeline.build import Pipeline
from prunekit.records import RunReport, StageEvent
from prunekit.upstream import CACHE
from prunekit.verify.oracle import MaskedReference, Merge
from prunekit.verify.precision import Float64Throughout
from prunekit.verify.recorder import recorded
from prunekit.verify.shortened import ShortenedReference
from prunekit.verify.stock import StockRun

Merges = Callable[[RunReport], Mapping[int, Merge | Sequence[Tensor]]]


@dataclass(frozen=True)
class Equivalence:
    """A pruned run beside its reference.

    sequences: int64 (B, P + T), prompt and decoded tokens. logits, reference: float (B, T, vocabulary).
    error: the largest absolute difference of the two. cache: the KV cache that the run left behind. merges: as the
    reference was told them.
    """

    report: RunReport
    sequences: Tensor
    logits: Tensor
    reference: Tensor
    error: float
    cache: Any
    merges: Mapping[int, Merge | Sequence[Tensor]]

    def __str__(self) -> str:
        rows, steps = self.logits.shape[:2]
        return f"{self.report}\n  {steps} steps of {rows} samples equal the masked reference to {self.error:.1e}"


@dataclass(frozen=True)
class Replay:
    """A pruned run beside its reference, not judged yet.

    sequences, logits, reference, cache, merges: as in `Equivalence`. counts: where the report's counts do not follow
    from its decisions; held: where the cache holds something else than the report says; empty: they do.
    """

    report: RunReport
    sequences: Tensor
    logits: Tensor
    reference: Tensor
    cache: Any
    merges: Mapping[int, Merge | Sequence[Tensor]]
    counts: str
    held: str

    @property
    def errors(self) -> Tensor:
        """The largest absolute difference at each step of each row, float (B, T); infinite where one is NaN."""
        return (self.logits - self.reference).abs().nan_to_num(torch.inf).amax(-1)


def compared(
    model: PreTrainedModel,
    parts: Parts,
    pipeline: Pipeline,
    inputs: Mapping[str, Tensor],
    steps: int,
    atol: float,
    merges: Merges | None = None,
    stock_run: StockRun | None = None,
    processor: Any = None,
    **options: Any,
) -> Equivalence:
    """As `prunekit.verify.equivalence.assert_equivalent`, on a model of these parts. Observers are told nothing."""
    if model.dtype != torch.float64 and atol < 1e-6:
        raise ValueError(f"the model is in {model.dtype}; equality to {atol} needs float64: model.double()")
    found = replayed(model, parts, pipeline, inputs, steps, merges, stock_run, processor, **options)
    error = _compare(pipeline.name, found, atol)
    for problem in (found.counts, found.held):
        if problem:
            raise AssertionError(problem)
    return Equivalence(found.report, found.sequences, found.logits, found.reference, error, found.cache, found.merges)


def replayed(
    model: PreTrainedModel,
    parts: Parts,
    pipeline: Pipeline,
    inputs: Mapping[str, Tensor],
    steps: int,
    merges: Merges | None = None,
    stock_run: StockRun | None = None,
    processor: Any = None,
    **options: Any,
) -> Replay:
    """Both runs of `compared`. Raises AssertionError where the model is not left as it was."""
    if (beams := options.get("num_beams", 1)) > 1:
        options |= {"num_return_sequences": beams, "output_scores": True}
    exact = Float64Throughout() if model.dtype == torch.float64 else nullcontext()
    with exact, restored(model):
        with recorded(pipeline) as record, Attached(model, pipeline, parts, processor, observed=False) as run:
            output = generate(model, inputs, max_new_tokens=steps + 1, **options)
        if run.report is None:
            raise AssertionError("the run left no report")
        report = _of_prompts(run.report, beams)
        stated = merges(report) if merges else record.merges(run.report, beams)
        reference: MaskedReference | ShortenedReference
        if parts.opaque is None:
            reference = MaskedReference(model, inputs, report, stated, stock_run)
        else:
            reference = ShortenedReference(model, inputs, report, _as_merges(stated))
        tokens = output.sequences[:, inputs["input_ids"].shape[1] :]
        expected = torch.cat([reference.logits(tokens[beam::beams]) for beam in range(beams)])
        logits = torch.cat([_logits(output, beams)[beam::beams] for beam in range(beams)])
    held = _cache_problem(report, reference, output[CACHE], steps) if isinstance(reference, MaskedReference) else ""
    counts = _count_problem(report, reference, run)
    return Replay(report, output.sequences, logits, expected, output[CACHE], stated, counts, held)


def generate(model: PreTrainedModel, inputs: Mapping[str, Tensor], **options: Any) -> Any:
    """`model.generate`, greedy unless `options` say otherwise, to its full length, with raw logits and the cache."""
    call: Any = model.generate
    length = options["max_new_tokens"]
    defaults = {"do_sample": False, "min_new_tokens": length, "return_dict_in_generate": True, "output_logits": True}
    return call(**inputs, **(defaults | options))


def _logits(output: Any, beams: int) -> Tensor:
    """Raw logits along every returned sequence, (rows * beams, T, vocabulary)."""
    if beams == 1:
        return torch.stack(output.logits, dim=1)
    length = len(output.logits)
    return torch.stack([output.logits[step][output.beam_indices[:, step]] for step in range(length)], dim=1)


def _of_prompts(report: RunReport, beams: int) -> RunReport:
    """The report of one row for each prompt; AssertionError when the beams of a prompt were not treated alike."""
    if beams == 1:
        return report
    changes: dict[str, Any] = {"samples": report.samples // beams}
    for name in ("prompt_tokens", "visual_tokens", "kept_tokens", "layer_tokens", "mlp_tokens", "kv_tokens", "plans"):
        changes[name] = _first(getattr(report, name), beams)
    events = []
    for event in report.events:
        sizes = None if event.sizes is None else _first(event.sizes, beams)
        resized = None if event.resized is None else _first(event.resized, beams)
        entered, kept = _first(event.entered, beams), _first(event.kept, beams)
        events.append(replace(event, entered=entered, kept=kept, sizes=sizes, resized=resized))
    return replace(report, events=tuple(events), **changes)


def _first(rows: Sequence[Any], beams: int) -> tuple[Any, ...]:
    for start in range(0, len(rows), beams):
        if any(row != rows[start] for row in rows[start : start + beams]):
            raise AssertionError(f"the {beams} beams of prompt {start // beams} differ: {rows}")
    return tuple(rows[::beams])


def _compare(name: str, found: Replay, atol: float) -> float:
    worst = found.errors
    error = float(worst.max())
    if error > atol:
        row, step = divmod(int(worst.argmax()), worst.shape[1])
        raise AssertionError(
            f"pipeline {name}: logits differ from the masked reference by {error:.3g} (allowed {atol:.3g}), most in "
            f"row {row} at {'prefill' if step == 0 else f'decode step {step}'}; per row and step:\n{worst}\n"
            f"{found.report}"
        )
    return error


def _as_merges(stated: Mapping[int, Merge | Sequence[Tensor]]) -> dict[int, Merge]:
    return {number: one if isinstance(one, Merge) else Merge(one) for number, one in stated.items()}


def _count_problem(report: RunReport, reference: MaskedReference | ShortenedReference, run: Attached) -> str:
    """Where the report's counts do not follow from its decisions; without any, its KV is the dense model's, with its
    windows.
    """
    for name in ("layer_tokens", "mlp_tokens", "kv_tokens"):
        said, expected = getattr(report, name), getattr(reference.tables, name)()
        if name == "kv_tokens" and not run.active:
            expected = tuple(stock_kv_tokens(run.bound.shape, tokens[0]) for tokens in report.layer_tokens)
        if said != expected:
            return f"the report says {name} {said}, its decisions give {expected}"
    return ""


def _cache_problem(report: RunReport, reference: MaskedReference, cache: Any, steps: int) -> str:
    """Where the cache holds something else than the report says."""
    for number, layer in enumerate(cache.layers):
        if "Static" in type(layer).__name__ or type(layer).__name__ == "DynamicSlidingWindowLayer":
            continue  # the length of a buffer says nothing, a stock window holds no more than it
        if reference.sources[number] != number or number in reference.recurrent:
            if kv_length(cache, number):
                return f"layer {number} holds KV entries, but reads those of another layer, or a state"
            continue
        decoded = steps * any(plan.decoding(number).writes_kv for plan in report.plans)
        least, most = (max(row[number] for row in rows) + decoded for rows in (report.kv_tokens, report.layer_tokens))
        # Rows with plans or crops of their own may leave holes in a rectangle.
        alike = all(plan == report.plans[0] for plan in report.plans)
        exact = alike and (report.samples == 1 or not any(_crops(one) for one in report.events))
        held = kv_length(cache, number)
        if held != least if exact else not least <= held <= most:
            return f"the cache holds {held} KV entries in layer {number}, the report says {least}"
    return ""


def _crops(event: StageEvent) -> bool:
    return event.crop or event.site == "prefill_end"


def kv_length(cache: Any, layer: int) -> int:
    """KV entries that one layer of a cache really holds for each row; keys and values have as many."""
    if not hasattr(cache.layers[layer], "keys"):  # a recurrent state
        return 0
    keys, values = cache.layers[layer].keys, cache.layers[layer].values
    if keys is None or keys.numel() == 0:
        return 0
    if keys.shape[:-1] != values.shape[:-1]:
        raise AssertionError(f"layer {layer}: keys {tuple(keys.shape)}, values {tuple(values.shape)}")
    return int(keys.shape[-2])


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """AssertionError unless parameters, buffers and the attributes of every module are afterwards what they were."""
    weights = {name: tensor.clone() for name, tensor in _tensors(model)}
    attributes = {name: _attributes(module) for name, module in model.named_modules()}
    yield
    for name, tensor in _tensors(model):
        if name not in weights or not torch.equal(tensor, weights[name]):
            raise AssertionError(f"{name} has changed")
    for name, module in model.named_modules():
        if _attributes(module) != attributes.get(name):
            raise AssertionError(f"module '{name}' has other attributes: {_attributes(module)}")


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _attributes(module: nn.Module) -> dict[str, int]:
    """The functions that stand on a module itself, over those of its class."""
    return {name: id(value) for name, value in vars(module).items() if callable(value) and not name.startswith("_")}
