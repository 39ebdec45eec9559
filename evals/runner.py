"""Many pipelines on many tasks with one loaded model; every cell is written as soon as it is known."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from prunekit import loading
from prunekit.decisions import ModelShape
from prunekit.errors import InputError, PrunekitError
from prunekit.pipeline import Pipeline

from . import quiet, results, scoring, tasks
from .answering import Loaded, Tally, device_type
from .generation import HonorUntil
from .identity import code_identity, model_identity, versions
from .results import Cell, Conditions, PipelineId, Saved, Timing
from .tasks import Built, Data, Named
from .timing import measure_prefill

# lmms-eval's own default on its command line; through its API it would score a reasoning model's thoughts.
REASONING_TAGS = '[["<think>", "</think>"], ["<analysis>", "</analysis>"]]'


@dataclass(frozen=True)
class Plan:
    """What to evaluate. data: where task data is. limit: questions a task, None for all. force: also what is there."""

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
    download: bool = False
    force: bool = False
    timing: bool = True


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
        dense = not bound.token_stages and not bound.plan.actions
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
            cell = replace(cell, error=reason(error))
        path = results.path_of(self.plan.out, cell)
        results.write(path, cell)
        if cell.status == "done":
            self._journal(cell.task, path).unlink(missing_ok=True)  # every answer is in the cell now
        self.progress.end(cell)
        return cell

    def _journal(self, task: str, path: Path) -> Path:
        return path.with_suffix(".journal.jsonl")

    def _compute(self, cell: Cell, built: Built, pipeline: Pipeline) -> Cell:
        from .lmms import PruneKitChat, PruneKitSimple, Settings

        plan = self.plan
        path = self.path(built.name, pipeline)
        journal = self._journal(built.name, path)
        if plan.force:
            journal.unlink(missing_ok=True)
        settings = Settings(plan.batch_size, plan.max_new_tokens, plan.system_prompt, plan.honor_until)
        kind = PruneKitChat if built.chat else PruneKitSimple
        model = kind.over(self.loaded, pipeline, settings, str(journal))
        model.progress = self.progress.advance
        with model.journal:
            found = evaluate(model, built, path.with_suffix(".files"))
        done = scoring.questions(built.name, found["samples"][built.name])
        return replace(
            cell,
            status="done",
            task_version=str(found["versions"].get(built.name, "")),
            metrics=metrics_of(found["results"][built.name]),
            questions=done,
            saved=saved(model.tally),
            timing=self._timing(model.tally, pipeline),
            notes=tuple(sorted(model.tally.notes)),
        )

    def _timing(self, tally: Tally, pipeline: Pipeline) -> Timing:
        seconds = tally.seconds / tally.computed if tally.computed else None
        base = Timing(seconds, tally.computed, tally.journaled)
        taken = measure_prefill(self.loaded, pipeline, tally.first_prompts) if self.plan.timing else None
        if taken is None:
            return base
        return replace(
            base, prefill_ms=taken.ms, dense_prefill_ms=taken.dense_ms, prefill_ratio=taken.ratio,
            prefill_batch=taken.batch, prefill_rounds=taken.rounds,
        )  # fmt: skip


def evaluate(model: Any, built: Built, files: Path) -> dict[str, Any]:
    """One task through lmms-eval's `simple_evaluate`, with its own metric code. What a task writes goes to `files`."""
    from lmms_eval.evaluator import simple_evaluate

    with quiet.harness():
        found = simple_evaluate(
            model=model,
            tasks=[built.task],
            task_manager=built.manager,
            batch_size=model.batch_size,
            limit=built.limit,
            bootstrap_iters=0,
            log_samples=True,
            verbosity="ERROR",
            distributed_executor_backend="torchrun" if model.world_size > 1 else "accelerate",
            cli_args=argparse.Namespace(
                output_path=str(files), process_with_media=False, reasoning_tags=REASONING_TAGS
            ),
        )
    if not isinstance(found, dict):
        raise PrunekitError("lmms-eval gave no results")
    return found


def metrics_of(reported: dict[str, Any]) -> dict[str, float]:
    """The numbers among what lmms-eval reports of a task; `N/A` and empty ones are left out."""
    return {
        name: float(value)
        for name, value in reported.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and "," in name
    }


def saved(tally: Tally) -> Saved | None:
    """Means over the questions, and fractions of the totals; None when nothing was reported."""
    facts = tally.facts
    if not facts:
        return None
    flops, dense_flops = sum(f.prefill_flops for f in facts), sum(f.dense_prefill_flops for f in facts)
    kv, dense_kv = sum(f.kv_bytes for f in facts), sum(f.dense_kv_bytes for f in facts)
    return Saved(
        visual_tokens=statistics.fmean(f.visual_tokens for f in facts),
        kept_tokens=statistics.fmean(f.kept_tokens for f in facts),
        prefill_flops=flops / len(facts),
        dense_prefill_flops=dense_flops / len(facts),
        flops_fraction=flops / dense_flops,
        kv_bytes=kv / len(facts),
        dense_kv_bytes=dense_kv / len(facts),
        kv_fraction=kv / dense_kv,
    )


def reason(error: Exception) -> str:
    """What went wrong, in one line; lmms-eval's retries hide it one level down."""
    attempt = getattr(error, "last_attempt", None)
    cause = attempt.exception() if attempt is not None else None
    if isinstance(cause, Exception):
        return reason(cause)
    text = " ".join(str(error).split())[:500]
    return text if isinstance(error, PrunekitError) else f"{type(error).__name__}: {text}"
