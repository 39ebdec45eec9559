"""The options of `prunekit eval`, `compare` and `demo`, and some that others share; what they do is imported when one
runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from prunekit_evals.run import settings
from prunekit_evals.run.settings import Answers, Asked

from prunekit.cli.arguments import positive

OUT = Path("results")
EVAL_EXAMPLES = """\
examples:
  prunekit eval fastv-k2-r25 random-r25 --model micro --tasks pope,gqa --limit 200
  prunekit eval fastv.yaml --model llava-hf/llava-1.5-7b-hf --tasks pope,mme --download --batch-size 16
  prunekit eval fastv-k2-r25 random-r25 --grid stages.0.keep=0.5,0.25,0.11 --seeds 3 --model micro --tasks pope
A cell that is there already is not computed again; a run that was killed goes on where it was.
Exit codes: 0 done; 1 some cells failed (each says why, the others are there); 2 your input is wrong.
"""


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the three commands."""
    _eval(commands)
    _compare(commands)
    _demo(commands)


def _eval(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "eval",
        help="score pipelines on tasks of lmms-eval",
        description="Score pipelines, and the dense model beside them, with lmms-eval's own tasks and metrics.",
        epilog=EVAL_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("pipelines", nargs="*", metavar="PIPELINE", help="files or names; without any, dense alone")
    command.add_argument("--model", required=True, metavar="M", help="a short name such as micro, a folder or a hub id")
    command.add_argument("--tasks", required=True, metavar="T,T", help="names of lmms-eval, such as pope,mme,gqa")
    _variants(command)
    command.add_argument("--no-dense", action="store_true", help="leave the dense model out")
    command.add_argument(
        "--data-root", type=Path, metavar="DIR",
        help="a folder with <organisation>/<dataset>/ as on the hub; default: the hub's local cache; "
        "for bundled models the bundled benchmark",
    )  # fmt: skip
    command.add_argument(
        "--include-path", type=Path, metavar="DIR", help="a folder with tasks of your own: YAML files of lmms-eval"
    )
    command.add_argument(
        "--questions", type=Path, metavar="FILE",
        help="ask these questions of each task, by number: JSON such as {\"pope\": [3, 17]}; searches write one",
    )  # fmt: skip
    answers = command.add_argument_group("how answers are made (all of it is recorded)")
    add_settings(answers, *(name for name in settings.names(Answers) if name != "unanswered"))
    _common(command, limit=None)


def _variants(command: argparse.ArgumentParser) -> None:
    """Options that make other pipelines of those that are named."""
    command.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE",
        help="change one value of every pipeline, such as stages[0].keep=0.3, and call it so; may be repeated",
    )  # fmt: skip
    command.add_argument(
        "--grid", action="append", default=[], metavar="KEY=V,V",
        help="every pipeline with each of these values, as rows of their own, such as stages.0.keep=0.5,0.25; "
        "may be repeated: every combination",
    )  # fmt: skip
    command.add_argument(
        "--seeds", type=positive, default=1, metavar="N",
        help="so many seeds of every pipeline that draws at random, as one row; default: 1",
    )  # fmt: skip


def _compare(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "compare",
        help="results side by side with the dense model",
        description=(
            "Compare results: accuracy with intervals, paired differences to dense and to random at the same cost, "
            "which of them hold, and what was really saved."
        ),
        epilog="example: prunekit compare results/micro --markdown",
    )
    command.add_argument("folder", nargs="?", type=Path, default=OUT, metavar="DIR", help="default: results")
    command.add_argument("--markdown", action="store_true", help="as Markdown")
    command.add_argument("--json", action="store_true", help="machine-readable, with all numbers in full")
    command.set_defaults(run=_run("compare"))


def _demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "demo",
        help="the main job, end to end, on the bundled model",
        description="Score shipped pipelines on the bundled model through lmms-eval, and compare them.",
        epilog="example: prunekit demo --limit 50",
    )
    add_settings(command, "batch_size")
    _common(command, limit=200)


def _common(command: argparse.ArgumentParser, limit: int | None) -> None:
    add_settings(command, "limit", "subset_seed", "unanswered", limit=limit)
    command.add_argument("--out", type=Path, default=OUT, metavar="DIR", help="where results go; default: results")
    command.add_argument("--force", action="store_true", help="compute again what is there")
    command.add_argument("--no-timing", action="store_true", help="do not measure prefill times")
    # The bundled model's matrices are too small to share: a second thread costs more than it brings.
    threads = 1 if limit else None
    command.add_argument(
        "--threads", type=positive, default=threads, metavar="N",
        help=f"CPU threads; default: {threads or 'torch chooses'}",
    )  # fmt: skip
    command.add_argument("--download", action="store_true", help="models and data that are not here may be fetched")
    command.add_argument("--json", action="store_true", help="machine-readable on stdout; messages stay on stderr")
    command.set_defaults(run=_run("demo" if limit else "evaluate"))


def add_settings(command: argparse._ActionsContainer, *names: str, told: bool = True, **defaults: Any) -> None:
    """Options that set what `run.settings` declares, by these names.

    told: False: a file may say them too, so that an option which is not given is None. defaults: other ones than there.
    """
    kinds, declared = get_type_hints(Asked), {one.name: one for one in fields(Asked)}
    for name in names:
        about = declared[name].metadata
        default = defaults.get(name) or declared[name].default
        usual = "" if default in (None, "") or not told else f"; default: {default}"
        action: dict[str, Any] = {"default": default if told else None, "help": about["help"] + usual}
        if get_origin(kinds[name]) is Literal:
            action["choices"] = get_args(kinds[name])
        else:
            action |= {"metavar": about["metavar"], "type": _kind(about)}
        command.add_argument(f"--{name.replace('_', '-')}", **action)


def _kind(about: Mapping[str, Any]) -> Callable[[str], Any]:
    """What reads the text of a setting."""
    if about["above"] is not None:
        return _rate
    return str if about["least"] is None else (natural, positive)[about["least"]]


def _run(name: str) -> Callable[[argparse.Namespace], int]:
    """The function of that name, imported when it is called."""

    def run(namespace: argparse.Namespace) -> int:
        from prunekit_evals.cli import commands

        return int(getattr(commands, name)(namespace))

    return run


def add_results(command: argparse.ArgumentParser) -> None:
    """The folders whose results a command reads."""
    command.add_argument(
        "results", nargs="*", type=Path, default=[OUT], metavar="RESULTS",
        help=f"folders that `prunekit eval` wrote; default: {OUT}",
    )  # fmt: skip


def natural(text: str) -> int:
    """A whole number of at least 0, for argparse."""
    if not text.isascii() or not text.isdecimal():
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least 0")
    return int(text)


def _rate(text: str) -> float:
    """A number above 0."""
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate < float("inf"):
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of frames a second above 0")
    return rate
