"""`prunekit sweep`: everything that a file asks for, on all workers. Messages go to stderr, tables to stdout."""

from __future__ import annotations

import argparse
import json
import sys
import time
from contextlib import AbstractContextManager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunekit_evals.cli.arguments import OUT, natural

from prunekit.cli.arguments import positive

if TYPE_CHECKING:
    from prunekit_evals.sweep.orders import Ordered
    from prunekit_evals.sweep.spec import SweepSpec
    from prunekit_evals.sweep.worker import Report

EXAMPLES = """\
examples:
  prunekit sweep sweep.yaml
  prunekit sweep sweep.yaml limit=20 --workers 2 --out results/small
  prunekit sweep sweep.yaml --ray auto      # on the Ray cluster that runs here
A cell that is there already is not computed again: call it again after whatever happened, on as many machines as share
the folder. docs/sweep.md says what the file holds.
Exit codes: 0 done; 1 some cells failed (each says why, the others are there); 2 your input is wrong.
"""


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    command = commands.add_parser(
        "sweep",
        help="pipelines x models x tasks x budgets x seeds from one file",
        description="Evaluate everything that a sweep file asks for: each cell once, by several workers.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("sweep", metavar="FILE", help="a sweep file")
    command.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE",
        help="change one value of the file, such as limit=20; may be repeated; a bare KEY=VALUE does the same",
    )  # fmt: skip
    command.add_argument("--out", type=Path, default=OUT, metavar="DIR", help="where results go; default: results")
    command.add_argument(
        "--workers", type=positive, metavar="N",
        help="processes, one model each; default: one for each GPU, without GPUs one for each core, at most 4",
    )  # fmt: skip
    command.add_argument(
        "--threads", type=positive, metavar="N", help="CPU threads of each; default: the cores, divided among them"
    )
    command.add_argument(
        "--ray", nargs="?", const="local", metavar="ADDRESS",
        help="workers are actors of this Ray cluster (auto: the one that runs here); without ADDRESS one is begun",
    )  # fmt: skip
    command.add_argument(
        "--retries", type=natural, default=2, metavar="N",
        help="how many times more a cell is tried whose worker died; default: 2",
    )  # fmt: skip
    command.add_argument(
        "--skip-infeasible", action="store_true", help="leave out rows that cannot meet a budget, and say so"
    )
    command.add_argument("--force", action="store_true", help="compute again what is there")
    command.add_argument("--download", action="store_true", help="models and data that are not here may be fetched")
    command.add_argument("--dry-run", action="store_true", help="check all of it, say what it asks for, stop")
    command.add_argument("--json", action="store_true", help="machine-readable on stdout; messages stay on stderr")
    command.set_defaults(run=run)


def run(namespace: argparse.Namespace) -> int:
    """Check, compute what is missing, show the tables. 1 when cells failed."""
    from prunekit_evals.cli import commands
    from prunekit_evals.lmms import quiet, tasks
    from prunekit_evals.sweep import spec
    from prunekit_evals.sweep.orders import Where, ordered

    from prunekit.errors import InputError

    tasks.check_installed()
    commands.need_rich()
    commands.need_scipy()
    quiet.before_imports(namespace.download)
    asked = spec.load(namespace.sweep, namespace.overrides)
    _calibrate(namespace, asked)
    where = Where(namespace.out, namespace.download, namespace.force, namespace.skip_infeasible)
    wanted = ordered(asked, where)
    for text in (*(f"warning: {note}" for note in wanted.notes), *(f"left out: {one}" for one in wanted.skipped)):
        commands.say(text)
    if namespace.dry_run:
        _show(wanted, namespace.json)
        return 0
    try:
        namespace.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {namespace.out}: {error.strerror} (name a folder that can be written)") from error
    return _report(_go(namespace, wanted), namespace)


def _calibrate(namespace: argparse.Namespace, asked: SweepSpec) -> None:
    """Make what pipelines need of a calibration. Raises InputError where a dry run would have to."""
    from prunekit_evals.sweep import calibrations

    from prunekit.errors import InputError

    for one in calibrations.missing(asked):
        if namespace.dry_run:
            raise InputError(f"'{one.out}' is to be calibrated first, which takes the model (leave --dry-run out)")
        with redirect_stdout(sys.stderr):
            calibrations.make(asked, one, namespace.download)


def _go(namespace: argparse.Namespace, wanted: Ordered) -> list[Report]:
    from prunekit_evals.cli import commands
    from prunekit_evals.sweep.driver import Driver
    from rich.console import Console

    jobs = wanted.jobs
    console: Console = commands.console(stderr=True)
    # Ray prints what happens to its machines; stdout is for the table.
    with redirect_stdout(sys.stderr), _pool(namespace, wanted) as pool, _Bar(console, len(jobs)) as bar:
        many = "worker" if pool.size == 1 else "workers"
        bar.say(f"{len(jobs)} cells, {pool.size} {many}")
        return Driver(jobs, pool, bar, namespace.retries).run()


def _pool(namespace: argparse.Namespace, wanted: Ordered) -> AbstractContextManager[Any]:
    from prunekit_evals.sweep.worker import Setup, cores, devices

    cells = len(wanted.jobs)
    if namespace.ray is not None:
        from prunekit_evals.sweep.cluster import RayPool

        setup = Setup(wanted.orders, namespace.threads or 1, namespace.download)
        return RayPool(setup, namespace.ray, namespace.workers, cells)
    from prunekit_evals.sweep.local import LocalPool

    found = devices(namespace.workers, cells)
    threads = namespace.threads or max(cores() // len(found), 1)
    return LocalPool(Setup(wanted.orders, threads, namespace.download), found)


class _Bar:
    """How far it is: a bar on a terminal, else a line for each cell. A context manager."""

    def __init__(self, console: Any, cells: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.console, self.cells, self.done, self.computed = console, cells, 0, 0
        self._bars = Progress(*columns, TextColumn("{task.fields[left]}"), console=console, transient=True)
        self._bar = self._bars.add_task("cells", total=cells, left="")
        self._begun = time.monotonic()

    def __enter__(self) -> _Bar:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def ended(self, report: Report) -> None:
        """A cell is there, or has failed."""
        self.done += 1
        self.computed += report.computed
        self._bars.update(self._bar, completed=self.done, left=self._left())
        name = "/".join(Path(report.path).parts[-2:]).rpartition(".json")[0] if report.path else "a cell"
        if report.status == "failed":
            self.console.print(f"failed: {name}: {report.error}", markup=False, style="red")
        elif report.computed and not self.console.is_terminal:
            self.console.print(f"done: {name} ({self.done} of {self.cells}{self._left()})", markup=False)

    def say(self, text: str) -> None:
        """A line above the bar."""
        self.console.print(text, markup=False)

    def _left(self) -> str:
        """How long the rest will take, if it goes on as it went; empty while that is not known."""
        from prunekit_evals.cli.progress import about

        if not self.computed or self.done == self.cells:
            return ""
        return f", about {about((time.monotonic() - self._begun) / self.computed * (self.cells - self.done))} left"


def _show(wanted: Ordered, as_json: bool) -> None:
    """What would be computed."""
    import prunekit

    listed = [
        {"model": order.model, "task": task, "pipeline": prunekit.load(text).name}
        for order in wanted.orders
        for task in order.tasks
        for text in order.pipelines
    ]
    if as_json:
        print(json.dumps({"cells": listed}, indent=2))
    else:
        for order in wanted.orders:
            names = [one["pipeline"] for one in listed if one["model"] == order.model and one["task"] == order.tasks[0]]
            print(f"{order.model}: {', '.join(order.tasks)}\n  " + "\n  ".join(names))
        print(f"{len(listed)} cells")


def _report(reports: list[Report], namespace: argparse.Namespace) -> int:
    from prunekit_evals.cli import commands
    from prunekit_evals.run import results
    from prunekit_evals.runner import Outcome

    cells, lost = [], []
    for report in reports:
        if report.path and Path(report.path).is_file():
            cells.append(results.read(Path(report.path)))
        else:
            lost.append(report.error or f"'{report.path}' is not to be seen from here: share the folder of --out")
    computed = sum(report.computed for report in reports)
    outcome = Outcome(tuple(cells), computed, len(cells) - computed)
    commands.report(outcome, namespace.out, namespace.json)
    for text in dict.fromkeys(lost):
        sys.stderr.write(f"  no result: {text}\n")
    return 1 if outcome.failed or lost else 0
