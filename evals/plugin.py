"""What this package adds to prunekit through the entry-point group `prunekit`. Imports nothing heavy."""

from __future__ import annotations

import argparse

from prunekit_evals import shapes
from prunekit_evals.cli import arguments, bench, leaderboard, micro, results, search, sweep

from prunekit.hookspecs import hookimpl


@hookimpl
def prunekit_commands(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """`prunekit eval`, `compare`, `demo`, `sweep`, `results`, `leaderboard`, `bench`, `search` and `micro`."""
    arguments.add(subparsers)
    sweep.add(subparsers)
    results.add(subparsers)
    leaderboard.add(subparsers)
    bench.add(subparsers)
    search.add(subparsers)
    micro.add(subparsers)


@hookimpl
def prunekit_models() -> dict[str, str]:
    """The bundled models, and the configs of published ones."""
    configs = {name: f"{shapes.__name__}:{shapes.attribute(name)}" for name in shapes.NAMES}
    return {"micro": "prunekit_evals.micro:model_path", "smol": "prunekit_evals.smol:model_path", **configs}


@hookimpl
def prunekit_data() -> dict[str, str]:
    """The bundled models' own scenes, with questions."""
    return {"micro-scenes": "prunekit_evals.micro.scene_prompts:source"}
