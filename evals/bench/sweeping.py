"""How long a sweep takes, beside one call of lmms-eval for each of its cells.

    python -m prunekit_evals.bench.sweeping --pipelines 5 --questions 100
    python -m prunekit_evals.bench.sweeping --pipelines 20 --questions 500 --cells 4

Both are programs of their own and compute on as many cores, on the bundled model with the bundled benchmark, in batches
of as many questions, without timing prefills. Of the calls of lmms-eval a few cells are measured, drawn evenly, and
taken for all; `--cells 0` measures none.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TASKS = ("pope", "gqa", "mmbench_en_dev_static", "textvqa_val")


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(
        prog="python -m prunekit_evals.bench.sweeping", description=(__doc__ or "").partition("\n\n")[0]
    )
    made.add_argument("--pipelines", type=int, default=5, help="how many, dense among them (5)")
    made.add_argument("--questions", type=int, default=100, help="of each task (100)")
    made.add_argument("--tasks", default=",".join(TASKS), help="names, separated by commas")
    made.add_argument("--workers", type=int, default=2, help="of the sweep; calls of lmms-eval at once (2)")
    made.add_argument("--cells", type=int, default=4, help="calls of lmms-eval that are measured (4)")
    made.add_argument("--batch-size", type=int, default=8, help="(8)")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and print one JSON document."""
    arguments = parser().parse_args(argv)
    names, tasks = _pipelines(arguments.pipelines), arguments.tasks.split(",")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        from prunekit_evals.lmms.tasks import micro_data

        data = micro_data(root / "out" / "data" / "micro")  # once for both, and in neither time
        took = _sweep(root, names, tasks, arguments)
        calls = _calls(root, Path(str(data.root)), names, tasks, arguments)
    cells = len(names) * len(tasks)
    told: dict[str, Any] = {
        "cells": cells, "questions": arguments.questions, "workers": arguments.workers, "sweep_s": round(took, 1)
    }  # fmt: skip
    if calls:
        each = sum(calls) / len(calls)
        told |= {
            "lmms_eval_call_s": [round(one, 1) for one in calls], "lmms_eval_all_s": round(each * cells, 1),
            "ratio": round(each * cells / took, 2),
        }  # fmt: skip
    print(json.dumps(told, indent=2))
    return 0


def _pipelines(count: int) -> list[str]:
    """Names of shipped pipelines that fit the bundled model; `dense` first."""
    import prunekit
    from prunekit import loading, plugins
    from prunekit.errors import PrunekitError

    shape, found = loading.load_shape("micro"), ["dense"]
    for entry in plugins.registry().pipelines():
        try:
            prunekit.load(entry.name).bind(shape)
        except PrunekitError:
            continue
        found += [entry.name] * (entry.name not in found)
    if count > len(found):
        raise SystemExit(f"--pipelines is at most {len(found)}")
    return found[:count]


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def _sweep(root: Path, names: Sequence[str], tasks: Sequence[str], arguments: argparse.Namespace) -> float:
    file = root / "sweep.yaml"
    file.write_text(
        json.dumps(
            {"models": "micro", "tasks": list(tasks), "pipelines": list(names), "limit": arguments.questions,
             "batch_size": arguments.batch_size, "timing": False}
        )
    )  # fmt: skip
    command = [
        sys.executable, "-m", "prunekit", "sweep", str(file), "--out", str(root / "out"), "--workers",
        str(arguments.workers), "--threads", "1", "--json",
    ]  # fmt: skip
    begun = time.perf_counter()
    done = subprocess.run(command, env=_environment(), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the sweep failed: {done.stderr[-2000:]}")
    return time.perf_counter() - begun


def _calls(
    root: Path, data: Path, names: Sequence[str], tasks: Sequence[str], arguments: argparse.Namespace
) -> list[float]:
    """Seconds for each measured cell; with several workers so many run at once, and each counts its part."""
    cells = [(name, task) for name in names for task in tasks]
    step = max(len(cells) // max(arguments.cells, 1), 1)
    chosen = cells[::step][: arguments.cells]
    took: list[float] = []
    for begin in range(0, len(chosen), arguments.workers):
        some = chosen[begin : begin + arguments.workers]
        begun = time.perf_counter()
        running = [_call(root, data, name, task, arguments) for name, task in some]
        if any(process.wait() for process in running):
            raise SystemExit(f"lmms-eval failed for one of {some}: see {root}")
        took += [(time.perf_counter() - begun) / len(some)] * len(some)
    return took


def _call(root: Path, data: Path, name: str, task: str, arguments: argparse.Namespace) -> subprocess.Popen[bytes]:
    from prunekit_evals.lmms.tasks import HARNESS_CACHE
    from prunekit_evals.micro import model_path

    pipeline = root / f"{name}.yaml"
    if not pipeline.is_file():
        import prunekit

        pipeline.write_text(prunekit.load(name).resolved)
    command = [
        sys.executable, "-m", "lmms_eval", "--model", "prunekit", "--model_args",
        f"pretrained={model_path()},pipeline={pipeline},device=cpu", "--tasks", task, "--batch_size",
        str(arguments.batch_size), "--limit", str(arguments.questions), "--output_path", str(root / "lmms"),
        "--device", "cpu",
    ]  # fmt: skip
    environment = {**_environment(), HARNESS_CACHE: str(root / "cache" / task)}
    with (root / f"{name}-{task}.log").open("wb") as log:
        return subprocess.Popen(command, cwd=data, env=environment, stdout=log, stderr=log)


if __name__ == "__main__":
    sys.exit(main())
