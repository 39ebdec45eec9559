"""What pipelines take on the user's own machine: tower, prefill and decoding steps, in turns with the dense model.

One measurement encodes the images, prefills the prompt with their features, and decodes some tokens; each part is timed
until the device is done. In every round the dense model and all pipelines run once, in a new order, so that whatever
else the machine does meets all alike; the first round is not counted. Pixels are random numbers, since a pipeline may
decide by them; what it decided is in its report.
"""

from __future__ import annotations

import gc
import inspect
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from prunekit_evals.bench.timing import PeakMemory, settled
from torch import Tensor

import prunekit
from prunekit import families
from prunekit.errors import InputError
from prunekit.estimate import arguments_of
from prunekit.pipeline.build import Pipeline
from prunekit.upstream import CACHE

# Text in front of the images, and decoding steps that are really run; longer answers are reckoned from them.
FRONT, STEPS = 8, 16
LEAST_ROUNDS = 3


@dataclass(frozen=True)
class Point:
    """What is measured: rows of a batch, images of each with their height and width in pixels, and other tokens."""

    batch: int
    image: tuple[int, int]
    images: int
    text: int


@dataclass(frozen=True)
class Inputs:
    """The prompt of a point. visual: tokens of each row. arguments: of the encoding method."""

    ids: Tensor
    arguments: Mapping[str, Any]
    more: Mapping[str, Any]
    visual: int


@dataclass
class Times:
    """Seconds of each counted round. memory: the most bytes allocated at once, weights included.

    flops: of the first token, as a fraction of dense, by the report; None where it does not say. cuts: sites, and how
    many visual tokens of the first row were left there.
    """

    tower: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)
    memory: int = 0
    flops: float | None = 1.0
    cuts: tuple[tuple[str, int], ...] = ()

    def first(self) -> list[float]:
        """To the first token, tower included, of each round."""
        return [tower + prefill for tower, prefill in zip(self.tower, self.prefill, strict=True)]

    def whole(self, new_tokens: int) -> list[float]:
        """To the last of `new_tokens` tokens, of each round."""
        return [first + (new_tokens - 1) * step for first, step in zip(self.first(), self.step, strict=True)]


def inputs_of(model: Any, processor: Any, point: Point) -> Inputs:
    """A prompt of random text with random images. Raises InputError for a model whose prompt cannot be made so."""
    parts = families.find(model)
    modality, device = parts.modalities[0], model.device
    arguments = arguments_of(processor, [point.image], point.batch * point.images)
    pixels = torch.randn(arguments[modality.pixels].shape, device=device).to(model.dtype)
    names = inspect.signature(getattr(parts.base, modality.method)).parameters
    others = {key: one for key, one in arguments.items() if key in names and key != modality.pixels}
    given = {key: one.to(device) for key, one in others.items() if isinstance(one, Tensor)}
    given[modality.pixels] = pixels
    with torch.inference_mode():
        features = getattr(parts.base, modality.method)(**given, return_dict=True).pooler_output
    total = sum(map(len, features))
    if total % point.batch:
        raise InputError(f"{total} visual tokens do not go evenly into {point.batch} rows")
    visual = total // point.batch
    vocabulary = model.config.get_text_config().vocab_size
    # Few words, none of them special: those at the ends of vocabularies often are.
    words = torch.randint(vocabulary // 4, vocabulary // 2, (point.batch, point.text), device=device)
    images = words.new_full((point.batch, visual), modality.token_ids[0])
    ids = torch.cat([words[:, :FRONT], images, words[:, FRONT:]], dim=1)
    kinds = (ids == modality.token_ids[0]).int()
    taken = inspect.signature(model.forward).parameters
    more = {name: kinds for name in ("mm_token_type_ids", "token_type_ids") if name in taken}
    more |= {name: value for name, value in given.items() if name in taken and name != modality.pixels}
    return Inputs(ids, given, more, visual)


class Clock:
    """Times work on a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, run: Callable[[], Any]) -> tuple[float, Any]:
        """Seconds until the device has done it, and what it gave."""
        self.wait()
        begin = time.perf_counter()
        result = run()
        self.wait()
        return time.perf_counter() - begin, result

    def wait(self) -> None:
        """Until the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class Peak:
    """The most bytes that were allocated at once inside the block, weights included, in `bytes`.

    On a GPU as its allocator counts; elsewhere the weights, and what tensors held besides.
    """

    def __init__(self, model: Any) -> None:
        self.device, self.bytes = model.device, 0
        self._tensors = PeakMemory()
        self._weights = sum(one.numel() * one.element_size() for one in model.parameters())

    def __enter__(self) -> Peak:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self._tensors.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device)
        else:
            self._tensors.__exit__(*error)
            self.bytes = self._weights + self._tensors.peak


@torch.inference_mode()
def once(model: Any, pipeline: Pipeline | None, inputs: Inputs, times: Times, counted: bool) -> None:
    """One measurement; one that is not counted notes what the pipeline did."""
    parts, clock = families.find(model), Clock(model.device)
    modality = parts.modalities[0]
    with prunekit.apply(model, pipeline) if pipeline else nullcontext() as run:
        encode = getattr(parts.base, modality.method)  # a pipeline has put its own there
        tower, features = clock(lambda: encode(**inputs.arguments, return_dict=True))
        given = {"input_ids": inputs.ids, "attention_mask": torch.ones_like(inputs.ids), **inputs.more}
        given |= {"mm_encoder_outputs": {modality.name: features}, "use_cache": True, "logits_to_keep": 1}
        prefill, output = clock(lambda: model(**given))
        cache, token = output[CACHE], inputs.ids.new_full((len(inputs.ids), 1), int(inputs.ids[0, 0]))
        taken = [clock(lambda: model(input_ids=token, **{CACHE: cache}))[0] for _ in range(STEPS + 1)]
        if counted:
            times.tower.append(tower)
            times.prefill.append(prefill)
            times.step.append(statistics.median(taken[1:]))  # the first one allocates
            return
        if run is not None and run.report is not None:
            times.flops = run.report.cost.whole_flops_fraction
            times.cuts = tuple((event.site, len(event.kept[0])) for event in run.report.events)


@settled()
def measure(
    model: Any, pipelines: Mapping[str, Pipeline | None], inputs: Inputs, rounds: int, seconds: float
) -> dict[str, Times]:
    """Every pipeline in interleaved rounds, until there are `rounds`, or `seconds` have passed and there are three."""
    times, begun = {name: Times() for name in pipelines}, time.perf_counter()
    for number in range(rounds + 1):
        order = list(pipelines)
        random.Random(number).shuffle(order)
        if number > LEAST_ROUNDS and time.perf_counter() - begun > seconds:
            break
        for name in order:
            gc.collect()
            if number:
                once(model, pipelines[name], inputs, times[name], True)
            else:
                with Peak(model) as peak:
                    once(model, pipelines[name], inputs, times[name], False)
                times[name].memory = peak.bytes
    return times


def twin_of(times: Times) -> Pipeline | None:
    """A pipeline that leaves as many tokens at the same sites, evenly spaced, which costs nothing to decide; None where
    that cannot be had: in the tower, or where nothing is cut.
    """
    if not times.cuts or any(site.startswith(("vision", "pixels", "prefill")) or not kept for site, kept in times.cuts):
        return None
    stages = [{"use": "stride", "at": site, "keep_tokens": kept} for site, kept in times.cuts]
    return prunekit.load({"name": "twin", "stages": stages})


@dataclass(frozen=True)
class Spread:
    """A median with the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
        return cls(statistics.median(values), min(low, middle), max(high, middle))


def speedup(own: Sequence[float], dense: Sequence[float]) -> Spread:
    """How many times faster than dense: of each round the ratio of neighbours."""
    return Spread.of([other / mine for mine, other in zip(own, dense, strict=True)])


def verdict(faster: Spread) -> str:
    """Whether pruning pays: `pays` and `costs` where both quartiles say so, `even` between."""
    return "pays" if faster.low > 1 else "costs" if faster.high < 1 else "even"


def random_model(config: Any, device: torch.device, dtype: torch.dtype, attn: str | None) -> Any:
    """A model with random weights, made on `device`: nothing of its size is ever held by the host."""
    import transformers

    auto: Any = transformers.AutoModelForImageTextToText
    torch.manual_seed(0)
    extra = {"attn_implementation": attn} if attn else {}
    with torch.device(device):
        model = auto.from_config(config, dtype=dtype, **extra)
    return model.eval().requires_grad_(False)
