"""What `prunekit eval`, `compare` and `demo` do. Progress and messages go to stderr, results to stdout."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from prunekit_evals.lmms import quiet

import prunekit
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
    _ready(namespace)
    plan = _plan(namespace, load_all(namespace.pipelines, namespace.overrides, dense=not namespace.no_dense))
    outcome = go(plan)
    _report(outcome, plan, namespace.json)
    return 1 if outcome.failed else 0


def compare(namespace: argparse.Namespace) -> int:
    """Show what is in a results folder."""
    need_scipy()
    from prunekit_evals.compare import rendering
    from prunekit_evals.compare import tables as comparing

    tables = comparing.tables(namespace.folder)
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
    _ready(namespace)
    namespace.model, namespace.tasks, namespace.data_root = "micro", ",".join(DEMO_TASKS), None
    plan = _plan(namespace, load_all(DEMO_PIPELINES, (), dense=True))
    outcome = go(plan)
    _report(outcome, plan, namespace.json)
    if not namespace.json:
        say(_next(plan, time.monotonic() - begun))
    return 1 if outcome.failed else 0


def load_all(sources: Sequence[str], overrides: Sequence[str], dense: bool) -> tuple[Pipeline, ...]:
    """Every pipeline once, dense first if wanted. Raises SpecError with all files' faults; InputError when there is
    none, or for another pipeline that calls itself dense.
    """
    loaded: list[Pipeline] = []
    faults: list[Fault] = []
    for source in sources:
        try:
            loaded.append(prunekit.load(source, overrides))
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


def say(text: str) -> None:
    """A message for a person."""
    sys.stderr.write(text + "\n")


def _ready(namespace: argparse.Namespace) -> None:
    from prunekit_evals.lmms import tasks

    tasks.check_installed()
    need_rich()
    need_scipy()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            "prunekit eval is one process; for several: torchrun ... -m lmms_eval --model prunekit (docs/evaluate.md)"
        )
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


def _plan(namespace: argparse.Namespace, pipelines: tuple[Pipeline, ...]) -> Plan:
    from prunekit_evals.lmms import tasks
    from prunekit_evals.runner import Plan

    names = [name.strip() for name in namespace.tasks.split(",") if name.strip()]
    if not names:
        raise InputError("--tasks names no task (for example --tasks pope,gqa)")
    micro = namespace.model in tasks.BUNDLED or all(name.startswith(f"{tasks.MICRO}/") for name in names)
    named = tasks.find([name.removeprefix(f"{tasks.MICRO}/") for name in names])
    arguments = vars(namespace)
    options = (
        "dtype", "device", "attn", "max_new_tokens", "system_prompt", "honor_until", "prompt_profile", "max_frames",
        "fps",
    )  # fmt: skip
    return Plan(
        model=namespace.model,
        pipelines=pipelines,
        tasks=tuple(named),
        data=_data(namespace, micro, names),
        out=namespace.out,
        limit=namespace.limit,
        batch_size=namespace.batch_size,
        download=namespace.download,
        force=namespace.force,
        timing=not namespace.no_timing,
        **{name: arguments[name] for name in options if name in arguments},
    )


def _data(namespace: argparse.Namespace, micro: bool, names: Sequence[str]) -> Any:
    from prunekit_evals.lmms import tasks

    if namespace.data_root is not None or not micro:
        data = tasks.data_at(namespace.data_root)
        if not data.micro and any(name.startswith(f"{tasks.MICRO}/") for name in names):
            raise InputError(f"tasks {', '.join(names)}: micro/... is the bundled benchmark; name all so, or none")
        return data
    from prunekit_evals.micro import benchmark

    for name in names:
        if name.removeprefix(f"{tasks.MICRO}/") not in benchmark.TASKS:
            listed = ", ".join(benchmark.TASKS)
            raise InputError(f"the bundled benchmark has no task '{name}' (it has {listed}; else give --data-root)")
    return tasks.micro_data(namespace.out / "data" / tasks.MICRO)


def go(plan: Plan) -> Outcome:
    """Run a plan under a progress bar."""
    from prunekit_evals import runner
    from prunekit_evals.cli import progress

    quiet.libraries()
    with progress.Bar(console(stderr=True)) as bar:
        return runner.Runner(plan, bar).run()


def _report(outcome: Outcome, plan: Plan, as_json: bool) -> None:
    from prunekit_evals.compare import rendering
    from prunekit_evals.compare import tables as comparing
    from prunekit_evals.run import results

    tables = comparing.of_cells(outcome.cells)
    if as_json:
        cells = [
            {"task": cell.label, "pipeline": cell.pipeline.name, "sha": cell.pipeline.sha, "status": cell.status,
             "error": cell.error, "metrics": dict(cell.metrics), "file": str(results.path_of(plan.out, cell))}
            for cell in outcome.cells
        ]  # fmt: skip
        summary = {"computed": outcome.computed, "there_before": outcome.skipped, "failed": len(outcome.failed)}
        print(json.dumps({**summary, "cells": cells, "tables": [one.to_json() for one in tables]}, indent=2))
        return
    for one in tables:
        if one.rows:
            rendering.show(one, console())
    counts = f"{outcome.computed} cells computed, {outcome.skipped} were there"
    failed = f", {len(outcome.failed)} failed:" if outcome.failed else ""
    say(f"\n{counts}{failed}")
    for cell in outcome.failed:
        say(f"  {cell.label} {cell.pipeline.name}: {cell.error}")
    say(f"results: {plan.out}/ (again: prunekit compare {plan.out})")


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
