"""A figure of keep maps as data: the images of one sample, and for each pipeline its stages and layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from prunekit.errors import InputError
from prunekit.families.images import Images
from prunekit.records import RunReport, Trace, VisualTokens
from prunekit.trace.exhibits import Exhibit, Picture, exhibits_of
from prunekit.trace.fates import StageMap
from prunekit.trace.surfaces import Placed, Surface, placed
from prunekit.trace.windows import Prepare


@dataclass(frozen=True)
class Run:
    """One pipeline's trace of the prompt, with the answer where there is one."""

    trace: Trace
    answer: str | None = None


@dataclass(frozen=True)
class Layer:
    """A decoder layer for one sample. prefill, decode: what is done with it, such as `run` or `skip`. tokens, visual:
    those that entered it in prefill.
    """

    number: int
    prefill: str
    decode: str
    tokens: int
    visual: int


@dataclass(frozen=True)
class Column:
    """What one pipeline did to the sample."""

    run: Run
    stages: tuple[StageMap, ...]
    layers: tuple[Layer, ...]

    @property
    def report(self) -> RunReport:
        """Of its prompt batch."""
        return self.run.trace.report


@dataclass(frozen=True, eq=False)
class Figure:
    """One sample under one or more pipelines.

    model, prompt: their names and words, or empty. exhibits: the sample's images and videos; placed: where the
    tokens of each are drawn. sample: its number in the batch.
    """

    model: str
    prompt: str
    exhibits: tuple[Exhibit, ...]
    placed: tuple[Placed, ...]
    columns: tuple[Column, ...]
    sample: int

    @property
    def surfaces(self) -> tuple[Surface, ...]:
        """Of all images and videos, in order."""
        return tuple(surface for one in self.placed for surface in one.surfaces)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader should know: of places, then of runs, once each."""
        of_places = [one.note for one in self.placed if one.note]
        apart = sum(len(one.separators) for one in self.placed)
        of_places += [f"{apart} of the visual tokens only separate rows or images, and are not drawn"] * bool(apart)
        runs = [f"{column.report.pipeline}: {note}" for column in self.columns for note in column.report.notes]
        return tuple(dict.fromkeys([*of_places, *runs]))


def figure_of(
    runs: Sequence[Run],
    pictures: Sequence[Picture] = (),
    *,
    sample: int = 0,
    prepare: Prepare | None = None,
    holder: Images | None = None,
    model: str = "",
    prompt: str = "",
) -> Figure:
    """A figure of one prompt batch under one or more pipelines.

    runs: of the same prompts, on the same model. pictures: the images and videos of the sample in the order of the
    prompt, a video as its frames; none: grids are drawn without them. sample: its number in the batch. prepare: from
    other images of the same sizes to the model's inputs, by which it is found out what part of an image each crop
    shows; None: nothing is drawn on images that are not known to be shown as a whole. holder: `Tower.images` of
    the model's family. model, prompt: to be shown.
    Raises InputError where runs, pictures and sample do not belong together.
    """
    if not runs:
        raise InputError("there is nothing to draw: give the trace of at least one run")
    if not (inputs := _inputs(runs, sample)):
        raise InputError(f"there is nothing to draw: sample {sample} shows no image and no video")
    exhibits = exhibits_of(inputs, pictures, prepare, holder)
    counts = Counter(one.tokens.kind for one in exhibits)
    numbers: Counter[str] = Counter()
    surfaces = []
    for number, one in enumerate(exhibits):
        kind = one.tokens.kind
        numbers[kind] += 1
        surfaces.append(placed(one, number, kind if counts[kind] == 1 else f"{kind} {numbers[kind]}"))
    columns = tuple(_column(run, sample) for run in runs)
    return Figure(model, prompt, exhibits, tuple(surfaces), columns, sample)


def _inputs(runs: Sequence[Run], sample: int) -> tuple[VisualTokens, ...]:
    """The images and videos of the sample, which are those of all runs."""
    for run in runs:
        samples = run.trace.samples
        if not 0 <= sample < len(samples):
            raise InputError(f"there is no sample {sample}: the batch has {len(samples)}, counted from 0")
    listed = [[one.ordinals for one in run.trace.samples[sample].inputs] for run in runs]
    if any(other != listed[0] for other in listed):
        raise InputError("the runs are of different prompts: trace all pipelines on the same inputs")
    return runs[0].trace.samples[sample].inputs


def _column(run: Run, sample: int) -> Column:
    trace, report = run.trace.samples[sample], run.trace.report
    original = report.visual_tokens[sample]
    stages = tuple(StageMap(report.events[one.event], one, original, sample) for one in trace.stages)
    text, plan = report.prompt_tokens[sample] - original, report.plans[sample]
    layers = tuple(
        Layer(number, plan[number].value, plan.decoding(number).value, tokens, max(tokens - text, 0))
        for number, tokens in enumerate(report.layer_tokens[sample])
    )
    return Column(run, stages, layers)
