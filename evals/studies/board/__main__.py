"""Score what is shipped on a bundled model, and write docs/leaderboard: results, page and Markdown.

    make leaderboard                             # the shipped pipelines on prunekit-micro
    make leaderboard BOARD_ARGS="--model smol"   # every strategy at 50, 25 and 11 % of the tokens on prunekit-smol

Cells that are there already are not computed again, and the section of the other model stays as it is.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from prunekit_evals.studies.board import sweep

if TYPE_CHECKING:
    from prunekit_evals.run.results import Cell
    from prunekit_evals.runner import Plan

    from prunekit.pipeline.build import Pipeline

DOCS = Path(__file__).resolve().parents[3] / "docs"
BOARD, SWEEP = DOCS / "leaderboard", DOCS / "leaderboard" / "smol.yaml"
SHOWN = 21  # the scene of which keep maps are drawn, as in docs/trace.md
SEEDED, SEEDS = "random-r11", 5  # the baseline at the cost of most shipped pipelines


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(
        prog="python -m prunekit_evals.studies.board", description=(__doc__ or "").partition("\n\n")[0]
    )
    made.add_argument("--model", default="micro", choices=("micro", sweep.MODEL), help="whose section; default: micro")
    made.add_argument("--limit", type=int, metavar="N", help=f"questions of each task (100; of smol {sweep.LIMIT})")
    made.add_argument("--out", type=Path, default=BOARD, metavar="DIR", help="default: docs/leaderboard")
    made.add_argument("--data", type=Path, default=Path("build/leaderboard"), metavar="DIR", help="for the benchmark")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Compute what is missing of one section, leave out what is out of date, and write the whole board."""
    arguments = parser().parse_args(argv)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        os.environ.setdefault(name, "1")
    from prunekit_evals.lmms import quiet

    quiet.before_imports(False)
    import torch
    from prunekit_evals.cli import commands, leaderboard
    from prunekit_evals.leaderboard import board, pictures
    from prunekit_evals.run import results

    torch.set_num_threads(1)
    plan = (_plan_of_micro if arguments.model == "micro" else _plan_of_sweep)(arguments)
    others = _of_others(plan.out, arguments.model)
    outcome = commands.go(plan)
    _tidy(plan.out, {results.path_of(plan.out, cell): cell for cell in [*outcome.cells, *others]})
    maps = arguments.out / "keep-maps"
    if arguments.model == "micro":
        _draw(plan.pipelines, maps)
    made = board.of_cells([*outcome.cells, *others])
    leaderboard.show(made)
    leaderboard.write(made, arguments.out / "index.html", arguments.out / "board.md", pictures.read(maps).of)
    return 1 if outcome.failed else 0


def _of_others(folder: Path, model: str) -> list[Cell]:
    """The cells of other models that are there."""
    from prunekit_evals.run import reading

    there = reading.read([folder]).cells if folder.is_dir() else ()
    return [cell for cell in there if cell.conditions.model != model]


def _plan_of_micro(arguments: argparse.Namespace) -> Plan:
    """The shipped pipelines on the demo's tasks."""
    from prunekit_evals.cli import commands
    from prunekit_evals.lmms import tasks
    from prunekit_evals.runner import Plan

    found, data = tuple(tasks.find(commands.DEMO_TASKS)), tasks.micro_data(arguments.data)
    out, limit = arguments.out / "results", arguments.limit or 100
    return Plan(tasks.MICRO, tuple(_pipelines()), found, data, out, limit=limit)


def _plan_of_sweep(arguments: argparse.Namespace) -> Plan:
    """What the sweep file asks for, once its calibrations are there."""
    from prunekit_evals.sweep import calibrations, orders, spec

    sweep.write(SWEEP)
    limit = arguments.limit or sweep.LIMIT
    asked = spec.load(SWEEP, [f"limit={limit}", f"data_root={arguments.data.resolve()}"])
    for one in calibrations.missing(asked):
        calibrations.make(asked, one, False)
    (order,) = orders.ordered(asked, orders.Where((arguments.out / "results").resolve())).orders
    return orders.plan_of(order)


def _draw(pipelines: Sequence[Pipeline], folder: Path) -> None:
    """What each pipeline keeps of one image of the benchmark."""
    from prunekit.cli import main as cli

    for stale in folder.glob("*"):
        stale.unlink()
    names = [pipeline.name for pipeline in pipelines if not pipeline.name.startswith(f"{SEEDED}-")]
    asked = ["--model", "micro", "--data", "micro-scenes", "--number", str(SHOWN), "--thumbnails", str(folder)]
    if cli.main(["trace", *names, *asked]):
        raise SystemExit(1)


def _tidy(folder: Path, current: Mapping[Path, Cell]) -> None:
    """Leave the current cells alone, each on one line: they are many, and a checkout carries them all."""
    for stale in set(folder.rglob("*.json")) - current.keys():
        stale.unlink()
    for beside in list(folder.rglob("*.files")):  # what tasks write for a judge
        shutil.rmtree(beside)
    for path, cell in current.items():
        text = json.dumps(cell.to_json(), ensure_ascii=False, separators=(",", ":"))
        path.write_text(f"{text}\n", encoding="utf-8")
    for empty in sorted(folder.rglob("*"), reverse=True):
        if empty.is_dir() and not any(empty.iterdir()):
            empty.rmdir()


def _pipelines() -> Iterator[Pipeline]:
    """Every shipped pipeline that fits the bundled model, and more seeds of the random one; says what does not fit."""
    import prunekit
    from prunekit import loading, plugins
    from prunekit.errors import PrunekitError

    shape = loading.load_shape("micro")
    for entry in plugins.registry().pipelines():
        try:
            pipeline = prunekit.load(entry.name)
            pipeline.bind(shape)
        except PrunekitError as error:
            sys.stderr.write(f"left out: {entry.name}: {error}\n")
            continue
        yield pipeline
    for seed in range(1, SEEDS):
        yield prunekit.load(SEEDED, [f"name={SEEDED}-s{seed}", f"stages[0].seed={seed}"])


if __name__ == "__main__":
    sys.exit(main())
