"""`prunekit train`: a router for a frozen model, from the pipeline that names it."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from prunekit.cli.arguments import add_common, add_data, add_loading, load


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    command = commands.add_parser(
        "train",
        help="train the router of a pipeline beside a frozen model",
        description="Train the router that a pipeline names, without labels: the dense model is the teacher. "
        "A training that was killed goes on where its last checkpoint was.",
        epilog="example: prunekit train par --set stages[0].weights=null --model micro "
        "--data micro-scenes --out runs/router; a pipeline that names a router trains that one further",
    )
    command.add_argument("pipeline", help="a pipeline (file or name) with one router, and its training budget")
    add_data(command)
    command.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for the router")
    add_common(command, model=True)
    command.add_argument("--recipe", type=Path, metavar="FILE", help="training options, as YAML")
    command.add_argument(
        "--train", action="append", default=[], dest="changes", metavar="KEY=VALUE",
        help="change one training option, such as lr=0.001; may be repeated",
    )  # fmt: skip
    add_loading(command)
    command.add_argument("--restart", action="store_true", help="begin anew, whatever is in the folder")
    command.set_defaults(run=run)


def run(namespace: argparse.Namespace) -> int:
    """Train. What can be checked without the weights is checked before they are loaded."""
    from prunekit import loading
    from prunekit.errors import InputError
    from prunekit.pipeline.build import build
    from prunekit.training import checkpoint
    from prunekit.training.data import source
    from prunekit.training.processes import Processes
    from prunekit.training.recipe import read_recipe
    from prunekit.training.teacher import router_of
    from prunekit.training.trainer import Trainer, finished

    pipeline = build(namespace.pipeline, namespace.overrides)
    recipe = read_recipe(namespace.recipe, namespace.changes)
    router_of(pipeline)
    pipeline.bind(loading.load_shape(namespace.model, namespace.download))
    data = source(namespace.data)
    if namespace.restart:
        checkpoint.remove(namespace.out)
    elif finished(namespace.out):
        raise InputError(f"'{namespace.out}' holds a router already (name another folder, or use --restart)")
    _make(namespace.out)
    processes = Processes(namespace.device)
    processes.check_batch(recipe.batch)
    model, processor = load(namespace, processes.device)
    trainer = Trainer(
        model, processor, pipeline, data, recipe, namespace.out, namespace.model, namespace.data, _say, processes
    )
    progress = trainer.run()
    start, end = progress.curve[0], progress.curve[-1]
    told = {"router": str(namespace.out), "steps": progress.step, "random": start["random"]}
    told |= {"start": start["held_out"], "held_out": end["held_out"]}
    if namespace.json:
        print(json.dumps(told, indent=2))
    elif processes.first:
        print(f"router in {namespace.out}: held-out KL {end['held_out']:.4f}", end="")
        print(f", at the start {start['held_out']:.4f}, by chance {start['random']:.4f}")
    return 0


def _make(folder: Path) -> None:
    """The folder of the router, before hours are spent on it."""
    from prunekit.errors import InputError

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"'{folder}' cannot hold a router: {error.strerror} (name another folder with --out)"
        ) from error
    if not os.access(folder, os.W_OK):
        raise InputError(f"'{folder}' cannot hold a router: it is read-only (name another folder with --out)")


def _say(line: str) -> None:
    """On a terminal, one line that changes; else a line each."""
    live = sys.stderr.isatty()
    sys.stderr.write(f"\r\x1b[K{line}" if live and " held_out " not in line else f"{line}\n")
    sys.stderr.flush()
