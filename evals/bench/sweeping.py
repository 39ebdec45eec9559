"""How long a sweep takes, beside one call of lmms-eval for each of its cells.

    python -m prunekit_evals.bench.sweeping --pipelines 5 --questions 100
    python -m prunekit_evals.bench.sweeping --pipelines 20 --questions 500 --cells 4

Both are programs of their own and compute on as many cores, on the bundled model with the bundled benchmark, in batches
of as many questions, without timing prefills. Of the calls of lmms-eval a few cells are measured, drawn evenly, and
taken for all; `--cells 0` measures none. Seconds are given by the clock, and of all processors together (Linux only):
these mean something on a busy machine too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HARNESS_CACHE = "LMMS_EVAL_DATASETS_CACHE"
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
    made.add_argument("--data", type=Path, help="where the bundled benchmark is, or shall be; default: made anew")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and print one JSON document."""
    arguments = parser().parse_args(argv)
    names, tasks = _pipelines(arguments.pipelines), arguments.tasks.split(",")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        from prunekit_evals.lmms.tasks import micro_data

        # Once for both, and in neither time. A folder `micro` beside the file would be taken for a router's weights.
        data = micro_data(arguments.data or root / "questions")
        sweep = _sweep(root, Path(str(data.root)), names, tasks, arguments)
        calls = _calls(root, Path(str(data.root)), names, tasks, arguments) if arguments.cells else []
    cells = len(names) * len(tasks)
    told: dict[str, Any] = {
        "cells": cells, "questions": arguments.questions, "workers": arguments.workers, "sweep": sweep.rounded(),
    }  # fmt: skip
    if calls:
        clock, work = (sum(getattr(one, of) for one in calls) / len(calls) * cells for of in ("clock", "work"))
        told |= {
            "lmms_eval_calls": [one.rounded() for one in calls],
            "lmms_eval_all": Took(clock, work).rounded(),
            "ratio": {"clock": round(clock / sweep.clock, 2), "work": round(work / max(sweep.work, 1e-9), 2)},
        }
    print(json.dumps(told, indent=2))
    return 0


@dataclass(frozen=True)
class Took:
    """Seconds by the clock, and of all processors together."""

    clock: float
    work: float

    def rounded(self) -> dict[str, float]:
        """For people."""
        return {"clock_s": round(self.clock, 1), "work_s": round(self.work, 1)}


def _timed(commands: Sequence[list[str]], folder: Path, log: Path, environment: Mapping[str, str]) -> Took:
    """Run programs beside each other, to their ends. Raises SystemExit where one fails."""
    begun, work = time.perf_counter(), dict[int, float]()
    with log.open("wb") as file:
        running = [
            subprocess.Popen(one, cwd=folder, env=dict(environment), stdout=file, stderr=file) for one in commands
        ]
        while any(process.poll() is None for process in running):
            for process in running:
                work |= _work(process.pid)
            time.sleep(0.2)
    if any(process.returncode for process in running):
        raise SystemExit(f"{commands[0]} failed:\n{log.read_text(errors='replace')[-2000:]}")
    return Took(time.perf_counter() - begun, sum(work.values()))


def _work(pid: int) -> dict[int, float]:
    """Seconds of processors that a process and all below it have used so far, by their numbers."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        below = [(one / "children").read_text().split() for one in Path(f"/proc/{pid}/task").iterdir()]
    except OSError:
        return {}
    found = {pid: (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")}
    for child in (int(child) for some in below for child in some):
        found |= _work(child)
    return found


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


def _sweep(
    root: Path, data: Path, names: Sequence[str], tasks: Sequence[str], arguments: argparse.Namespace
) -> Took:
    file = root / "sweep.yaml"
    asked = {
        "models": "micro", "tasks": list(tasks), "pipelines": list(names), "limit": arguments.questions,
        "batch_size": arguments.batch_size, "timing": False, "data_root": str(data.resolve()),
    }  # fmt: skip
    file.write_text(json.dumps(asked))
    command = [
        sys.executable, "-m", "prunekit", "sweep", str(file), "--out", str(root / "out"), "--workers",
        str(arguments.workers), "--threads", "1", "--json",
    ]  # fmt: skip
    return _timed([command], root, root / "sweep.log", _environment())


def _calls(
    root: Path, data: Path, names: Sequence[str], tasks: Sequence[str], arguments: argparse.Namespace
) -> list[Took]:
    """Of each measured call, as many at once as there are workers, of which each counts its part of the clock."""
    cells = [(name, task) for name in names for task in tasks]
    step = max(len(cells) // arguments.cells, 1)
    chosen = cells[step // 2 :: step][: arguments.cells]
    took: list[Took] = []
    for begin in range(0, len(chosen), arguments.workers):
        some = chosen[begin : begin + arguments.workers]
        commands = [_command(root, name, task, arguments) for name, task in some]
        environment = {**_environment(), HARNESS_CACHE: str(root / "cache")}
        both = _timed(commands, data, root / "lmms.log", environment)
        took += [Took(both.clock / len(some), both.work / len(some))] * len(some)
    return took


def _command(root: Path, name: str, task: str, arguments: argparse.Namespace) -> list[str]:
    from prunekit_evals.micro import model_path

    import prunekit

    pipeline = root / f"{name}.yaml"
    pipeline.write_text(prunekit.load(name).resolved)
    return [
        sys.executable, "-m", "lmms_eval", "--model", "prunekit", "--model_args",
        f"pretrained={model_path()},pipeline={pipeline},device=cpu", "--tasks", task, "--batch_size",
        str(arguments.batch_size), "--limit", str(arguments.questions), "--output_path", str(root / "lmms"),
        "--device", "cpu",
    ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
