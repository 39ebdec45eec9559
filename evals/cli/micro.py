"""The options of `prunekit micro card`; what it does is imported when it runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from prunekit_evals.micro import model_path


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `prunekit micro`."""
    micro = commands.add_parser(
        "micro",
        help="about the bundled model",
        description="About the bundled model: `card` measures it and writes its model card.",
        epilog="example: prunekit micro card --render",
    )
    micro.add_argument("what", choices=("card",), metavar="WHAT", help="card: measure the model and write its card")
    micro.add_argument(
        "--model", type=Path, default=model_path(), metavar="DIR", help="folder of the model; default: the bundled one"
    )
    micro.add_argument("--seed", default="1", metavar="N", help="the seed it was trained with; default: 1")
    micro.add_argument(
        "--other", type=_seeded, action="append", default=[], metavar="N=DIR",
        help="a model of the same recipe with seed N, measured as well; may be repeated",
    )  # fmt: skip
    micro.add_argument("--curve", type=Path, metavar="FILE", help="curve.jsonl of the training run, to be copied in")
    micro.add_argument("--questions", type=int, default=500, metavar="N", help="questions a task at most; default: 500")
    micro.add_argument("--render", action="store_true", help="only write the text anew, from what was measured")
    micro.set_defaults(run=_run)


def _seeded(text: str) -> tuple[str, Path]:
    seed, equals, folder = text.partition("=")
    if not (seed.isdigit() and equals and (Path(folder) / "config.json").is_file()):
        message = f"{text!r} is not SEED=DIR with the folder of a model (write, for instance, 2=runs/micro-seed2/model)"
        raise argparse.ArgumentTypeError(message)
    return seed, Path(folder)


def _run(arguments: argparse.Namespace) -> int:
    from prunekit_evals.micro import card

    return card.run(arguments)
