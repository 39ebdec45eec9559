"""Score the shipped pipelines on the bundled model, and write docs/leaderboard: results, page and Markdown.

make leaderboard    # cells that are there already are not computed again
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

if TYPE_CHECKING:
    from prunekit_evals.run.results import Cell

    from prunekit.pipeline.build import Pipeline

BOARD = Path(__file__).resolve().parents[3] / "docs" / "leaderboard"
SHOWN = 21  # the scene of which keep maps are drawn, as in docs/trace.md
SEEDED, SEEDS = "random-r11", 5  # the baseline at the cost of most shipped pipelines


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(
        prog="python -m prunekit_evals.studies.board", description=(__doc__ or "").partition("\n\n")[0]
    )
    made.add_argument("--limit", type=int, default=100, metavar="N", help="questions of each task (100)")
    made.add_argument("--out", type=Path, default=BOARD, metavar="DIR", help="default: docs/leaderboard")
    made.add_argument("--data", type=Path, default=Path("build/leaderboard"), metavar="DIR", help="for the benchmark")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Compute what is missing, leave out what is out of date, and write."""
    arguments = parser().parse_args(argv)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        os.environ.setdefault(name, "1")
    from prunekit_evals.lmms import quiet

    quiet.before_imports(False)
    import torch
    from prunekit_evals.cli import commands, leaderboard
    from prunekit_evals.leaderboard import board, pictures
    from prunekit_evals.lmms import tasks
    from prunekit_evals.run import results
    from prunekit_evals.runner import Plan

    torch.set_num_threads(1)
    plan = Plan(
        tasks.MICRO, tuple(_pipelines()), tuple(tasks.find(commands.DEMO_TASKS)), tasks.micro_data(arguments.data),
        arguments.out / "results", limit=arguments.limit,
    )  # fmt: skip
    outcome = commands.go(plan)
    _tidy(plan.out, {results.path_of(plan.out, cell): cell for cell in outcome.cells})
    maps = arguments.out / "keep-maps"
    _draw(plan.pipelines, maps)
    made = board.of_cells(outcome.cells)
    leaderboard.show(made)
    leaderboard.write(made, arguments.out / "index.html", arguments.out / "board.md", pictures.read(maps).of)
    return 1 if outcome.failed else 0


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
