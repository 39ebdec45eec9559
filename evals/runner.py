"""Many pipelines on many tasks with one loaded model; every cell is written as soon as it is known."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol

import yaml
from prunekit_evals.bench.prefill import measure_prefill
from prunekit_evals.lmms import harness, quiet, scoring, tasks
from prunekit_evals.lmms.tasks import Built, Data, Named
from prunekit_evals.run import claims, receipts, results, seeds, unanswered
from prunekit_evals.run.answering import Loaded, Tally, device_type
from prunekit_evals.run.files import CannotWrite
from prunekit_evals.run.generation import HonorUntil
from prunekit_evals.run.identity import code_identity, machine, versions
from prunekit_evals.run.kept import ROOM, Kept
from prunekit_evals.run.results import Cell, Conditions, PipelineId, Timing
from prunekit_evals.run.unanswered import listed

from prunekit import loading
from prunekit.errors import InputError
from prunekit.loading import model_identity
from prunekit.pipeline.build import Pipeline
from prunekit.strategy.decisions import ModelShape
from prunekit.video_files import MAX_FRAMES, Sampling

HELD = 0.5  # seconds until a cell that another process computes is looked for again


@dataclass(frozen=True)
class Plan:
    """What to evaluate. data: where task data is. limit: questions a task, None for all. subset_seed: drawn
    with it, not the first. force: also what is there.
    unanswered: whether questions that cannot be answered count as wrong, or fail their cell at its end.

    Raises InputError for two pipelines of one name, which results and tables could not tell apart.
    """

    model: str
    pipelines: tuple[Pipeline, ...]
    tasks: tuple[Named, ...]
    data: Data
    out: Path
    limit: int | None = None
    subset_seed: int | None = None
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
    unanswered: Literal["wrong", "fail"] = "wrong"

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


class Silent:
    """Tells nobody."""

    def begin(self, cells: int) -> None:
        """Nothing."""

    def cell(self, pipeline: str, task: str, questions: int) -> None:
        """Nothing."""

    def advance(self, questions: int) -> None:
        """Nothing."""

    def end(self, cell: Cell) -> None:
        """Nothing."""


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
    """One run of a plan. The model is loaded when the first cell needs it.

    computed: task and pipeline of the cells that this run computed.
    """

    def __init__(self, plan: Plan, progress: Progress) -> None:
        """Check that every pipeline fits the model, from its config alone. Raises PrunekitError, before any compute."""
        self.plan, self.progress = plan, progress
        self.shape: ModelShape = loading.load_shape(plan.model, plan.download)
        self.ids = {pipeline.sha: self._pipeline_id(pipeline) for pipeline in plan.pipelines}
        self._task: tuple[Named, Built | Exception] | None = None
        self.computed: set[tuple[str, str]] = set()
        # By file: which one it was when this run looked first, None for none.
        self._first_seen: dict[Path, tuple[int, int] | None] = {}

    def run(self) -> Outcome:
        """Compute what is missing. A cell that fails is written as failed, and the others go on.

        Cells that another process computes on the same folder are waited for, behind those that nobody does.
        """
        waiting = [(named, pipeline) for named, pipeline in self._all() if self._there(named, pipeline) is None]
        self.progress.begin(len(waiting))
        cells: dict[tuple[str, str], Cell] = {}
        while waiting:
            held = []
            for named, pipeline in waiting:
                cell = self.cell(named, pipeline)
                if cell is None:
                    held.append((named, pipeline))
                else:
                    cells[named.name, pipeline.sha] = cell
            if len(held) == len(waiting):
                time.sleep(HELD)
            waiting = held
        for named, pipeline in self._all():
            if (named.name, pipeline.sha) not in cells and (old := self._there(named, pipeline)) is not None:
                cells[named.name, pipeline.sha] = old
        ordered = tuple(cells[named.name, pipeline.sha] for named, pipeline in self._all())
        return Outcome(ordered, len(self.computed), len(ordered) - len(self.computed))

    def cell(self, named: Named, pipeline: Pipeline) -> Cell | None:
        """One cell: the one that is there, or a new one, which may have failed. None while another process computes it.

        What another process has written since this run looked first counts, as old as it may be under `force`.
        """
        if (old := self._there(named, pipeline)) is not None:
            self._tidy(old)
            return old
        with claims.claim(self.path(named.name, pipeline)) as ours:
            if not ours:
                return None
            if (new := self._there(named, pipeline)) is not None:
                self.progress.end(new)
                return new
            return self._made(named, pipeline)

    def failed(self, named: Named, pipeline: Pipeline, error: Exception) -> Cell | None:
        """The cell written as failed for this reason; as it is where it is there. None while another process has it."""
        with claims.claim(self.path(named.name, pipeline)) as ours:
            if not ours:
                return None
            old = self._there(named, pipeline)
            return self._finish(self._empty(named, pipeline), error) if old is None else old

    @cached_property
    def loaded(self) -> Loaded:
        """The model."""
        plan = self.plan
        loaded = Loaded.load(plan.model, plan.dtype, plan.device, plan.attn, plan.download)
        return replace(loaded, kept=Kept(ROOM))

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
            subset_seed=plan.subset_seed if plan.limit is not None else None,
            max_frames=plan.max_frames,
            fps=plan.fps,
        )

    @cached_property
    def data(self) -> dict[str, Data]:
        """By task where it takes its data: what the plan says, but those of the user's own."""
        return {named.name: tasks.data_of(named, self.plan.data) for named in self.plan.tasks}

    def conditions_of(self, task: str) -> Conditions:
        """The conditions of its cells."""
        return replace(self.conditions, data=self.data[task].identity)

    def path(self, task: str, pipeline: Pipeline) -> Path:
        """The file of a cell."""
        return results.cell_path(self.plan.out, self.conditions_of(task), self.ids[pipeline.sha], task)

    def _all(self) -> Iterator[tuple[Named, Pipeline]]:
        return ((named, pipeline) for named in self.plan.tasks for pipeline in self.plan.pipelines)

    def _there(self, named: Named, pipeline: Pipeline) -> Cell | None:
        path = self.path(named.name, pipeline)
        now = _written(path)
        before = self._first_seen.setdefault(path, now)
        if now is None or (self.plan.force and now == before):
            return None
        with suppress(InputError):  # a damaged cell is computed again
            cell = results.read(path)
            strict = self.plan.unanswered == "fail" and cell.unanswered
            return cell if (cell.status == "done" and not strict) or now != before else None
        return None

    def _pipeline_id(self, pipeline: Pipeline) -> PipelineId:
        bound = pipeline.bind(self.shape)
        dense = not bound.acts
        drawn = tuple(seeds.seeds(yaml.safe_load(pipeline.resolved)))
        return PipelineId(pipeline.name, pipeline.sha, dense, pipeline.resolved, code_identity(pipeline), drawn)

    def _made(self, named: Named, pipeline: Pipeline) -> Cell:
        """A new cell, written. A task that cannot be built is one reason why it failed."""
        cell = self._empty(named, pipeline)
        self.computed.add((named.name, pipeline.sha))
        try:
            built = self._build(named)
            self.progress.cell(pipeline.name, cell.label, built.questions)
            return self._finish(self._compute(cell, built, pipeline))
        except CannotWrite:
            raise
        except Exception as error:
            return self._finish(cell, error)

    def _build(self, named: Named) -> Built:
        """The task, built once for all cells that follow each other on it. Raises what it raised the first time."""
        if self._task is None or self._task[0] != named:
            plan = self.plan
            try:
                with quiet.harness():
                    data = self.data[named.name]
                    self._task = named, tasks.build(named, data, plan.limit, plan.prompt_profile, plan.subset_seed)
            except Exception as error:
                self._task = named, error
        built = self._task[1]
        if isinstance(built, Exception):
            raise built
        return built

    def _empty(self, named: Named, pipeline: Pipeline) -> Cell:
        which, conditions = self.ids[pipeline.sha], self.conditions_of(named.name)
        return Cell(
            id=results.cell_id(conditions, which, named.name),
            status="failed",
            task=named.name,
            label=self.data[named.name].label(named.name),
            pipeline=which,
            conditions=conditions,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def _finish(self, cell: Cell, error: Exception | None = None) -> Cell:
        if error is not None:
            cell = replace(cell, error=unanswered.reason(error))
        path = results.path_of(self.plan.out, cell)
        results.write(path, cell)
        if cell.status == "done":
            self._journal(cell.task, path).unlink(missing_ok=True)  # every answer is in the cell now
        self.progress.end(cell)
        return cell

    def _tidy(self, cell: Cell) -> None:
        """Take away what a process has left beside a cell that was killed just after it had written it."""
        path = results.path_of(self.plan.out, cell)
        journal = self._journal(cell.task, path)
        if cell.status == "done" and (claims.lock_of(path).exists() or journal.exists()):
            with claims.claim(path) as ours:
                if ours:
                    journal.unlink(missing_ok=True)

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
        self.loaded.kept.begin(built.name)
        model = kind.over(self.loaded, pipeline, settings, str(journal))
        model.progress = self.progress.advance
        model.unanswered.tolerant = True
        with model.journal:
            evaluated = harness.evaluate(model, built, path.with_suffix(".files"))
        images = {number: image for (task, number), image in model.tally.images.items() if task == built.name}
        lost = model.unanswered.of(built.name)
        done = scoring.questions(built.name, evaluated["samples"][built.name], images, lost)
        self._judge(lost, len(done))
        if built.numbers is not None:
            done = tuple(replace(one, number=built.numbers[one.number]) for one in done)
        return replace(
            cell,
            status="done",
            task_version=str(evaluated["versions"].get(built.name, "")),
            metrics=harness.metrics_of(evaluated["results"][built.name]),
            questions=done,
            saved=harness.saved(model.tally),
            timing=self._timing(model.tally, pipeline),
            notes=(*sorted(model.tally.notes), *receipts.missed(model.tally.facts)),
            unsound=model.tally.unsound,
            empty=sum(not (one.answer.strip() or one.error) for one in done),
            executed=receipts.executed(model.tally.facts),
            foretold=receipts.foretold(model.tally.facts, pipeline, self.shape),
        )

    def _judge(self, lost: Mapping[int, str], asked: int) -> None:
        """Raise InputError where questions that could not be answered fail the cell."""
        if len(lost) == asked:
            raise InputError(f"no question could be answered: {listed(lost)}")
        if lost and self.plan.unanswered == "fail":
            count = f"{len(lost)} of {asked} questions could not be answered"
            raise InputError(f"{count}: {listed(lost)} (--unanswered wrong counts them as wrong)")

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


def _written(path: Path) -> tuple[int, int] | None:
    """Which file this is, by its number and when it was written; None where there is none."""
    try:
        about = path.stat()
    except OSError:
        return None
    return about.st_ino, about.st_mtime_ns
