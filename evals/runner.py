"""Many pipelines on many tasks with one loaded model; every cell is written as soon as it is known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Protocol

from prunekit_evals.bench.prefill import measure_prefill
from prunekit_evals.lmms import harness, quiet, scoring, tasks
from prunekit_evals.lmms.tasks import Built, Data, Named
from prunekit_evals.run import results
from prunekit_evals.run.answering import Loaded, Tally, device_type
from prunekit_evals.run.generation import HonorUntil
from prunekit_evals.run.identity import code_identity, machine, versions
from prunekit_evals.run.results import Cell, Conditions, PipelineId, Timing
from prunekit_evals.run.videos import MAX_FRAMES, Sampling

from prunekit import loading
from prunekit.errors import InputError
from prunekit.loading import model_identity
from prunekit.pipeline.build import Pipeline
from prunekit.strategy.decisions import ModelShape


@dataclass(frozen=True)
class Plan:
    """What to evaluate. data: where task data is. limit: questions a task, None for all. force: also what is there.

    Raises InputError for two pipelines of one name, which results and tables could not tell apart.
    """

    model: str
    pipelines: tuple[Pipeline, ...]
    tasks: tuple[Named, ...]
    data: Data
    out: Path
    limit: int | None = None
    batch_size: int = 8
    dtype: str | None = None
    device: str | None = None
    attn: str | None = None
    max_new_tokens: int = 1024
    system_prompt: str = ""
    honor_until: HonorUntil = "stops"
    prompt_profile: str | None = None
    max_frames: int = MAX_FRAMES
    fps: float | None = None
    download: bool = False
    force: bool = False
    timing: bool = True

    def __post_init__(self) -> None:
        by_name: dict[str, Pipeline] = {}
        for pipeline in self.pipelines:
            other = by_name.setdefault(pipeline.name, pipeline)
            if other is not pipeline:
                both = f"{other.source} and {pipeline.source}"
                raise InputError(f"two pipelines are called '{pipeline.name}': {both} (give one another `name`)")


class Progress(Protocol):
    """Told how far a run is."""

    def begin(self, cells: int) -> None:
        """So many cells are to be computed."""

    def cell(self, pipeline: str, task: str, questions: int) -> None:
        """A cell begins."""

    def advance(self, questions: int) -> None:
        """So many more questions are answered."""

    def end(self, cell: Cell) -> None:
        """A cell is done or has failed, and is written."""


@dataclass(frozen=True)
class Outcome:
    """Every cell of the plan, the ones that were there before included."""

    cells: tuple[Cell, ...]
    computed: int
    skipped: int

    @property
    def failed(self) -> tuple[Cell, ...]:
        """The cells that failed, each with its reason."""
        return tuple(cell for cell in self.cells if cell.status == "failed")


class Runner:
    """One run of a plan. The model is loaded when the first cell needs it."""

    def __init__(self, plan: Plan, progress: Progress) -> None:
        """Check that every pipeline fits the model, from its config alone. Raises PrunekitError, before any compute."""
        self.plan, self.progress = plan, progress
        self.shape: ModelShape = loading.load_shape(plan.model, plan.download)
        self.ids = {pipeline.sha: self._pipeline_id(pipeline) for pipeline in plan.pipelines}

    def run(self) -> Outcome:
        """Compute what is missing. A cell that fails is written as failed, and the others go on."""
        missing = [(named, pipeline) for named, pipeline in self._all() if self._there(named, pipeline) is None]
        self.progress.begin(len(missing))
        cells: dict[tuple[str, str], Cell] = {}
        for named in self.plan.tasks:
            wanted = [pipeline for task, pipeline in missing if task == named]
            if wanted:
                cells |= {(named.name, cell.pipeline.sha): cell for cell in self._task(named, wanted)}
        for named, pipeline in self._all():
            if (named.name, pipeline.sha) not in cells and (old := self._there(named, pipeline)) is not None:
                cells[named.name, pipeline.sha] = old
        ordered = tuple(cells[named.name, pipeline.sha] for named, pipeline in self._all())
        return Outcome(ordered, len(missing), len(ordered) - len(missing))

    @cached_property
    def loaded(self) -> Loaded:
        """The model."""
        plan = self.plan
        return Loaded.load(plan.model, plan.dtype, plan.device, plan.attn, plan.download)

    @cached_property
    def conditions(self) -> Conditions:
        """What every cell of this run has in common."""
        plan = self.plan
        device = device_type(plan.device)
        where = loading.resolve(plan.model)
        identity = model_identity(where)
        if identity is None and self.loaded:  # loading has fetched it
            identity = model_identity(where)
        return Conditions(
            model=str(plan.model),
            identity=identity or "unknown",
            data=plan.data.identity,
            limit=plan.limit,
            batch_size=plan.batch_size,
            dtype=plan.dtype or ("float32" if device == "cpu" else "checkpoint"),
            device=device,
            attention=plan.attn or "default",
            max_new_tokens=plan.max_new_tokens,
            system_prompt=plan.system_prompt,
            honor_until=plan.honor_until,
            prompt_profile=plan.prompt_profile or "",
            versions=versions(),
            max_frames=plan.max_frames,
            fps=plan.fps,
        )

    def path(self, task: str, pipeline: Pipeline) -> Path:
        """The file of a cell."""
        return results.cell_path(self.plan.out, self.conditions, self.ids[pipeline.sha], task)

    def _all(self) -> Iterator[tuple[Named, Pipeline]]:
        return ((named, pipeline) for named in self.plan.tasks for pipeline in self.plan.pipelines)

    def _there(self, named: Named, pipeline: Pipeline) -> Cell | None:
        path = self.path(named.name, pipeline)
        if self.plan.force or not path.is_file():
            return None
        with suppress(InputError):  # a damaged cell is computed again
            cell = results.read(path)
            return cell if cell.status == "done" else None
        return None

    def _pipeline_id(self, pipeline: Pipeline) -> PipelineId:
        bound = pipeline.bind(self.shape)
        dense = not bound.acts
        return PipelineId(pipeline.name, pipeline.sha, dense, pipeline.resolved, code_identity(pipeline))

    def _task(self, named: Named, pipelines: Sequence[Pipeline]) -> Iterator[Cell]:
        plan = self.plan
        try:
            with quiet.harness():
                built = tasks.build(named, plan.data, plan.limit, plan.prompt_profile)
        except Exception as error:
            for pipeline in pipelines:
                yield self._finish(self._empty(named, pipeline), error)
            return
        for pipeline in pipelines:
            cell = self._empty(named, pipeline)
            self.progress.cell(pipeline.name, cell.label, built.questions)
            try:
                yield self._finish(self._compute(cell, built, pipeline))
            except Exception as error:
                yield self._finish(cell, error)

    def _empty(self, named: Named, pipeline: Pipeline) -> Cell:
        which = self.ids[pipeline.sha]
        return Cell(
            id=results.cell_id(self.conditions, which, named.name),
            status="failed",
            task=named.name,
            label=self.plan.data.label(named.name),
            pipeline=which,
            conditions=self.conditions,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def _finish(self, cell: Cell, error: Exception | None = None) -> Cell:
        if error is not None:
            cell = replace(cell, error=harness.reason(error))
        path = results.path_of(self.plan.out, cell)
        results.write(path, cell)
        if cell.status == "done":
            self._journal(cell.task, path).unlink(missing_ok=True)  # every answer is in the cell now
        self.progress.end(cell)
        return cell

    def _journal(self, task: str, path: Path) -> Path:
        return path.with_suffix(".journal.jsonl")

    def _compute(self, cell: Cell, built: Built, pipeline: Pipeline) -> Cell:
        from prunekit_evals.lmms.adapter import PruneKitChat, PruneKitSimple
        from prunekit_evals.lmms.requests import Settings

        plan = self.plan
        path = self.path(built.name, pipeline)
        journal = self._journal(built.name, path)
        if plan.force:
            journal.unlink(missing_ok=True)
        sampling = Sampling(plan.max_frames, plan.fps)
        settings = Settings(plan.batch_size, plan.max_new_tokens, plan.system_prompt, plan.honor_until, sampling)
        kind = PruneKitChat if built.chat else PruneKitSimple
        model = kind.over(self.loaded, pipeline, settings, str(journal))
        model.progress = self.progress.advance
        with model.journal:
            evaluated = harness.evaluate(model, built, path.with_suffix(".files"))
        images = {number: image for (task, number), image in model.tally.images.items() if task == built.name}
        done = scoring.questions(built.name, evaluated["samples"][built.name], images)
        return replace(
            cell,
            status="done",
            task_version=str(evaluated["versions"].get(built.name, "")),
            metrics=harness.metrics_of(evaluated["results"][built.name]),
            questions=done,
            saved=harness.saved(model.tally),
            timing=self._timing(model.tally, pipeline),
            notes=tuple(sorted(model.tally.notes)),
            unsound=model.tally.unsound,
        )

    def _timing(self, tally: Tally, pipeline: Pipeline) -> Timing:
        seconds = tally.seconds / tally.computed if tally.computed else None
        base = Timing(seconds, tally.computed, tally.journaled, machine=machine(self.loaded.device))
        wanted = self.plan.timing and not self.ids[pipeline.sha].dense
        taken = measure_prefill(self.loaded, pipeline, tally.first_prompts) if wanted else None
        if taken is None:
            return base
        return replace(
            base, prefill_ms=taken.ms, dense_prefill_ms=taken.dense_ms, prefill_ratio=taken.ratio,
            prefill_batch=taken.batch, prefill_rounds=taken.rounds,
        )  # fmt: skip
