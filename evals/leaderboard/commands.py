"""What makes a row again: commands and pipelines, read off what its cells record."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache

from prunekit_evals.run import chosen, settings, stamp
from prunekit_evals.run.results import Cell, Conditions, PipelineId
from prunekit_evals.run.settings import Answers

import prunekit
from prunekit import plugins
from prunekit.errors import PrunekitError

UNRECORDED = "{file} is the `questions.json` that the search wrote: not all of it is recorded here, since cells failed"
RECORDED = {one.name for one in fields(Conditions)}
UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True)
class Run:
    """One pipeline. file: what the command calls it, where it is to be written into a file; empty for a shipped one."""

    command: str
    file: str
    yaml: str


@dataclass(frozen=True)
class Chosen:
    """The file of questions that commands name. text: empty where not all of them are recorded, since cells failed."""

    file: str
    text: str


def chosen_of(cells: Sequence[Cell]) -> Chosen | None:
    """The questions behind these cells, of one table; None where they were not named one by one."""
    mark, rows = cells[0].conditions.chosen, chosen.recorded(cells)
    if not mark:
        return None
    return Chosen(f"questions-{mark}.json", chosen.text(rows) if chosen.mark(rows) == mark else "")


def of_cells(cells: Sequence[Cell]) -> tuple[Run, ...]:
    """One run for each pipeline behind these cells: for each seed, where a row has several."""
    tasks: dict[str, list[str]] = {}
    pipelines: dict[str, PipelineId] = {}
    for cell in cells:
        pipelines.setdefault(cell.pipeline.sha, cell.pipeline)
        tasks.setdefault(cell.pipeline.sha, []).append(cell.label)
    return tuple(_run(one, cells[0].conditions, tasks[sha]) for sha, one in pipelines.items())


def _run(pipeline: PipelineId, conditions: Conditions, tasks: Sequence[str]) -> Run:
    name = source(pipeline)
    file = "" if _shipped(pipeline.name) == pipeline.resolved else name
    return Run(command(name, conditions, tasks), file, pipeline.resolved)


def command(pipeline: str, conditions: Conditions, tasks: Sequence[str]) -> str:
    """`prunekit eval` of one pipeline, a name or a file, under these conditions. `DIR` stands for a folder of whoever
    runs it.
    """
    words = ["prunekit", "eval", pipeline, "--model", conditions.model, "--tasks", ",".join(dict.fromkeys(tasks))]
    given = {
        **_questions(conditions, tasks), "batch_size": conditions.batch_size, "device": conditions.device,
        "dtype": conditions.dtype if conditions.dtype != "checkpoint" else None,
        "attn": conditions.attention if conditions.attention != "default" else None,
    }  # fmt: skip
    given |= {name: getattr(conditions, name) for name in settings.names(Answers) if name in RECORDED - given.keys()}
    usual = {one.name: one.default for one in fields(Answers) if one.name not in ("batch_size", "device")}
    for name, value in given.items():
        if value not in (None, "") and value != usual.get(name):
            words += _option(f"--{name.replace('_', '-')}", str(value))
    return shlex.join([*words, "--no-dense"])


def _questions(conditions: Conditions, tasks: Sequence[str]) -> dict[str, object]:
    """Where questions come from, and which of them are asked."""
    told: dict[str, object] = {}
    identity = conditions.data.partition("+")[0]
    if identity.startswith("own-"):
        told["include_path"] = "DIR"
    elif identity not in ("hub", stamp.identity()):
        told["data_root"] = "DIR"
    if conditions.chosen:
        return {**told, "questions": f"questions-{conditions.chosen}.json"}
    return {**told, "limit": conditions.limit, "subset_seed": conditions.subset_seed}


def _option(name: str, value: str) -> list[str]:
    return [f"{name}={value}"] if value.startswith("-") else [name, value]


def source(pipeline: PipelineId) -> str:
    """The name of the shipped pipeline that it is, or that of a file to write it into."""
    if _shipped(pipeline.name) == pipeline.resolved:
        return pipeline.name
    return f"{UNSAFE.sub('-', pipeline.name).strip('-.') or 'pipeline'}.yaml"


@cache
def _shipped(name: str) -> str | None:
    """This installation's pipeline of that name, in full; None where there is none, or none that loads."""
    if name not in {entry.name for entry in plugins.registry().pipelines()}:
        return None
    try:
        return prunekit.load(name).resolved
    except PrunekitError:
        return None
