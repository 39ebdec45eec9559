"""What makes a row again: commands and pipelines, read off what its cells record."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from prunekit_evals.run.results import Cell, Conditions, PipelineId

import prunekit
from prunekit import plugins
from prunekit.errors import PrunekitError
from prunekit.video_files import MAX_FRAMES

UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True)
class Run:
    """One pipeline. file: what the command calls it, where it is to be written into a file; empty for a shipped one."""

    command: str
    file: str
    yaml: str


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
    """`prunekit eval` of one pipeline, a name or a file, under these conditions."""
    words = ["prunekit", "eval", pipeline, "--model", conditions.model, "--tasks", ",".join(dict.fromkeys(tasks))]
    if conditions.limit is not None:
        words += ["--limit", str(conditions.limit)]
    if conditions.subset_seed is not None:
        words += ["--subset-seed", str(conditions.subset_seed)]
    words += ["--batch-size", str(conditions.batch_size), "--device", conditions.device]
    usual = {
        "--dtype": (conditions.dtype, "checkpoint"), "--attn": (conditions.attention, "default"),
        "--max-new-tokens": (str(conditions.max_new_tokens), "1024"), "--system-prompt": (conditions.system_prompt, ""),
        "--honor-until": (conditions.honor_until, "stops"), "--prompt-profile": (conditions.prompt_profile, ""),
        "--max-frames": (str(conditions.max_frames), str(MAX_FRAMES)),
        "--fps": ("" if conditions.fps is None else str(conditions.fps), ""),
    }  # fmt: skip
    words += [word for option, (value, default) in usual.items() if value != default for word in (option, value)]
    return shlex.join([*words, "--no-dense"])


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
