"""What `prunekit eval`, `compare` and `demo` do. Progress and messages go to stderr, results to stdout."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from prunekit_evals.lmms import quiet
from prunekit_evals.run import chosen, files, settings
from prunekit_evals.run.files import CannotWrite
from prunekit_evals.run.settings import Asked
from prunekit_evals.run.variants import Variation, drawn, expand, read_grid

import prunekit
from prunekit.cli.prompts import is_text
from prunekit.errors import Fault, InputError, SpecError
from prunekit.pipeline.build import Pipeline

if TYPE_CHECKING:
    from prunekit_evals.runner import Outcome, Plan
    from rich.console import Console

DENSE = {"name": "dense", "stages": [{"use": "dense"}]}
DEMO_PIPELINES = (
    "dense", "random-r11", "stride-r11", "pool-r11", "divprune-r11", "fastv-k2-r25", "fastv-k2-r11", "compose",
    "par", "vtw-half", "blind",
)  # fmt: skip
DEMO_TASKS = ("pope", "gqa", "mmbench_en_dev_static")


def evaluate(namespace: argparse.Namespace) -> int:
    """Run the cells that are missing and show the table. 1 when cells failed."""
    ready(namespace)
    variation = Variation(tuple(namespace.overrides), read_grid(namespace.grid), namespace.seeds)
    pipelines = load_all(namespace.pipelines, variation, dense=not namespace.no_dense)
    if variation.seeds > 1 and not any(map(drawn, pipelines)):
        say(f"--seeds {variation.seeds}: none of these pipelines draws at random, so each runs once")
    plan = plan_of(namespace, pipelines)
    outcome = go(plan)
    report(outcome, plan.out, namespace.json)
    return 1 if outcome.failed else 0


def compare(namespace: argparse.Namespace) -> int:
    """Show what is in a results folder."""
    need_scipy()
    from prunekit_evals.compare import rendering
    from prunekit_evals.compare import tables as comparing

    tables, skipped = comparing.tables(namespace.folder)
    for one in skipped:
        say(f"skipped: {one}")
    if namespace.json:
        print(json.dumps([one.to_json() for one in tables], indent=2))
    elif namespace.markdown:
        print("\n".join(rendering.markdown(one) for one in tables))
    else:
        need_rich()
        for one in tables:
            rendering.show(one, console())
    return 0


def demo(namespace: argparse.Namespace) -> int:
    """The main job on the bundled model."""
    begun = time.monotonic()
    ready(namespace)
    namespace.model, namespace.tasks, namespace.data_root = "micro", ",".join(DEMO_TASKS), None
    plan = plan_of(namespace, load_all(DEMO_PIPELINES, Variation(), dense=True))
    outcome = go(plan)
    report(outcome, plan.out, namespace.json)
    if not namespace.json:
        say(_next(plan, time.monotonic() - begun))
    return 1 if outcome.failed else 0


def load_all(sources: Sequence[str], variation: Variation, dense: bool) -> tuple[Pipeline, ...]:
    """Every variant of every pipeline once, dense first if wanted.

    Raises SpecError with all files' faults; InputError when there is none, or for another pipeline that calls itself
    dense.
    """
    loaded: list[Pipeline] = []
    faults: list[Fault] = []
    for source in sources:
        try:
            loaded += [one.pipeline for one in expand(source, variation)]
        except SpecError as error:
            faults += error.faults
    if faults:
        raise SpecError(faults)
    if dense and not any(all(stage.use == "dense" for stage in pipeline.stages) for pipeline in loaded):
        if namesake := next((pipeline for pipeline in loaded if pipeline.name == DENSE["name"]), None):
            raise InputError(
                f"{namesake.source} is called '{namesake.name}', which is the name of the unpruned model beside it "
                "(give it another `name`, or leave that model out by --no-dense)"
            )
        loaded.insert(0, prunekit.load(DENSE))
    by_sha = {pipeline.sha: pipeline for pipeline in loaded}
    if not by_sha:
        raise InputError("nothing to evaluate: name a pipeline file, or leave --no-dense out")
    return tuple(by_sha.values())


def report(outcome: Outcome, out: Path, as_json: bool) -> None:
    """Tables on stdout, or one JSON document; then what was computed and what failed, on stderr."""
    from prunekit_evals.compare import rendering
    from prunekit_evals.compare import tables as comparing
    from prunekit_evals.run import results

    tables = comparing.of_cells(outcome.cells)
    if as_json:
        cells = [
            {"task": cell.label, "pipeline": cell.pipeline.name, "sha": cell.pipeline.sha, "status": cell.status,
             "error": cell.error, "metrics": dict(cell.metrics), "file": str(results.path_of(out, cell))}
            for cell in outcome.cells
        ]  # fmt: skip
        summary = {"computed": outcome.computed, "there_before": outcome.skipped, "failed": len(outcome.failed)}
        print(json.dumps({**summary, "cells": cells, "tables": [one.to_json() for one in tables]}, indent=2))
        return
    for one in tables:
        if one.rows:
            rendering.show(one, console())
    counts = f"{outcome.computed} results computed, {outcome.skipped} reused"
    failed = f", {len(outcome.failed)} failed:" if outcome.failed else ""
    say(f"\n{counts}{failed}")
    for cell in outcome.failed:
        say(f"  {cell.label} {cell.pipeline.name}: {cell.error}")
    say(f"results: {out}/ (again: prunekit compare {out})")


def say(text: str) -> None:
    """A message for a person."""
    sys.stderr.write(text + "\n")


def ready(namespace: argparse.Namespace) -> None:
    """Before anything heavy is imported. Raises InputError for what is not installed, and for several processes."""
    from prunekit_evals.lmms import tasks

    tasks.check_installed()
    need_rich()
    need_scipy()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            "prunekit eval is one process; for several: torchrun ... -m lmms_eval --model prunekit (docs/evaluate.md)"
        )
    if not is_text(vars(namespace).get("system_prompt") or ""):
        raise InputError("--system-prompt is not UTF-8 (convert it, for instance with iconv -t UTF-8)")
    quiet.before_imports(namespace.download)
    if namespace.threads:
        import torch

        torch.set_num_threads(namespace.threads)


def need_rich() -> None:
    """Raise InputError where tables cannot be shown."""
    if find_spec("rich") is None:
        raise InputError("tables and progress bars need rich: pip install 'prunekit[evals]' (or use --json)")


def need_scipy() -> None:
    """Before hours of answers, not after them."""
    if find_spec("scipy") is None:
        raise InputError("intervals and tests need scipy: pip install 'prunekit[evals]'")


def plan_of(namespace: argparse.Namespace, pipelines: tuple[Pipeline, ...]) -> Plan:
    """What the options ask for. Raises InputError for tasks and data that are not there."""
    from prunekit_evals.lmms import tasks
    from prunekit_evals.runner import Plan

    names = [name.strip() for name in namespace.tasks.split(",") if name.strip()]
    if not names:
        raise InputError("--tasks names no task (for example --tasks pope,gqa)")
    arguments = vars(namespace)
    if namespace.subset_seed is not None and namespace.limit is None:
        raise InputError("--subset-seed draws the questions of --limit, which is not given (for instance --limit 100)")
    files.folder(namespace.out)
    include = arguments.get("include_path")
    named, data = tasks.choose(namespace.model, names, namespace.data_root, namespace.out, include)
    told = {name: arguments[name] for name in settings.names(Asked) if name in arguments}
    if file := arguments.get("questions"):
        if namespace.limit is not None:
            raise InputError("--limit and --questions both say which questions are asked (give one of them)")
        data = replace(data, rows=chosen.read(file, [one.name for one in named]))
        told["limit"] = data.asked
    return Plan(
        model=namespace.model,
        pipelines=pipelines,
        tasks=tuple(named),
        data=data,
        out=namespace.out,
        download=namespace.download,
        force=namespace.force,
        timing=not namespace.no_timing,
        **told,
    )


def go(plan: Plan) -> Outcome:
    """Run a plan under a progress bar."""
    from prunekit_evals import runner
    from prunekit_evals.cli import progress

    quiet.libraries()
    with progress.Bar(console(stderr=True)) as bar:
        try:
            return runner.Runner(plan, bar).run()
        except CannotWrite as error:
            saved = f"{bar.saved} cells of this run are saved, and the answers to the next one so far"
            raise InputError(f"{error}; {saved}: the same command goes on there") from error


def _next(plan: Plan, seconds: float) -> str:
    commands = {
        f"prunekit compare {plan.out} --markdown": "the same table for a README",
        "prunekit show fastv-k2-r11 --model micro": "a pipeline as it runs, and what it costs",
        "prunekit list strategies": "what pipelines can be made of",
        "prunekit eval fastv-k2-r11 stages.0.at=4 --model micro --tasks pope --limit 200": "",
    }
    wide = max(len(command) for command, about in commands.items() if about)
    listed = (f"  {command:{wide}}  {about}".rstrip() for command, about in commands.items())
    return "\n".join([f"\nTook {seconds:.0f} s. Try next:", *listed])


def console(stderr: bool = False) -> Console:
    """Where tables and bars go."""
    from rich.console import Console

    console = Console(stderr=stderr)
    # A file or a pipe has no width of its own; rich would take 80 columns, into which no table goes.
    return console if console.is_terminal else Console(stderr=stderr, width=max(console.width, 120))
