"""`prunekit search`: the pipeline that answers best at a budget, found on some questions and judged on others."""

from __future__ import annotations

import argparse
import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunekit_evals.cli.arguments import add_settings
from prunekit_evals.run import settings
from prunekit_evals.run.settings import Answers

from prunekit.cli.arguments import is_override, positive

if TYPE_CHECKING:
    from prunekit_evals.runner import Plan
    from prunekit_evals.search.declared import Declared
    from prunekit_evals.search.report import Report

OUT = Path("searches")
EXAMPLES = """\
examples:
  prunekit search --strategies divprune,fastv --model micro --tasks pope,gqa --flops 0.3 --trials 20
  prunekit search search.yaml trials=40
What was answered is kept under searches/: a search that was interrupted goes on, and more trials continue it.
Exit codes: 0 done; 1 held-out cells failed; 2 your input is wrong.
"""
# Flags that say what a key of the file says, as it does or as a list.
PLAIN = (
    "model", "name", "stages", "trials", "calibration", "held_out", "factor", "seed", *settings.names(Answers),
)  # fmt: skip
LISTS = ("tasks", "strategies", "baselines")


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    command = commands.add_parser(
        "search",
        help="find the best pipeline at a budget",
        description="Search strategies, sites and options for the pipeline that answers most calibration questions\n"
        "within a budget, and compare it on held-out questions with dense, with random and with the best of\n"
        "the registered pipelines at the same cost.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("search", nargs="*", metavar="FILE", help="a search file; flags go before what it says")
    command.add_argument("--strategies", metavar="S,S", help="what pipelines may be made of")
    command.add_argument("--model", metavar="M", help="a short name such as micro, a folder or a hub id")
    command.add_argument("--tasks", metavar="T,T", help="names of lmms-eval, such as pope,gqa")
    command.add_argument("--flops", type=float, metavar="F", help="the budget: this fraction of dense's prefill FLOPs")
    command.add_argument("--stages", type=positive, metavar="N", help="most token stages of a pipeline; default: 2")
    command.add_argument("--trials", type=positive, metavar="N", help="candidates that are asked; default: 20")
    command.add_argument("--calibration", type=positive, metavar="N", help="questions a task to search on (100)")
    command.add_argument("--held-out", type=positive, metavar="N", help="other questions a task to judge on (200)")
    command.add_argument("--factor", type=positive, metavar="N", help="of how many candidates one goes on; default: 3")
    command.add_argument("--seed", type=int, metavar="N", help="of the questions and the draws; default: 0")
    command.add_argument("--baselines", metavar="P,P", help="pipelines to compare with; default: all registered ones")
    command.add_argument("--name", metavar="NAME", help="of the search and the pipeline; default: that of the file")
    command.add_argument("--out", type=Path, default=OUT, metavar="DIR", help="its folder goes there (searches)")
    command.add_argument("--write", type=Path, metavar="FILE", help="where the pipeline goes; default: there")
    command.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE",
        help="change one value of the file, such as trials=40; a bare KEY=VALUE does the same",
    )  # fmt: skip
    _answers(command)
    command.set_defaults(run=run)


def _answers(command: argparse.ArgumentParser) -> None:
    """Options as of `prunekit eval`."""
    command.add_argument("--data-root", type=Path, metavar="DIR", help="a folder with <organisation>/<dataset>/")
    command.add_argument("--include-path", type=Path, metavar="DIR", help="a folder with tasks of your own")
    add_settings(command, *settings.names(Answers), told=False)
    command.add_argument("--no-timing", action="store_true", help="do not measure prefill times")
    command.add_argument("--threads", type=positive, metavar="N", help="CPU threads; default: torch chooses")
    command.add_argument("--download", action="store_true", help="models and data that are not here may be fetched")
    command.add_argument("--json", action="store_true", help="machine-readable on stdout; messages stay on stderr")


def run(namespace: argparse.Namespace) -> int:
    """Search, judge, write. 1 when held-out cells failed."""
    from prunekit_evals.cli import commands

    from prunekit.errors import InputError

    if find_spec("optuna") is None:
        raise InputError("prunekit search draws candidates by optuna: pip install 'prunekit[search]'")
    commands.ready(namespace)
    declared = _declared(namespace)
    folder = namespace.out / declared.settings.name
    target = namespace.write or folder / f"{declared.settings.name}.yaml"
    if target.suffix not in (".yaml", ".yml") or target.is_dir():
        raise InputError(f"--write {target}: name a file that ends in .yaml")
    from prunekit_evals.run import files
    from prunekit_evals.search.report import report

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        made = report(declared, _searched(namespace, declared, folder))
        files.write(target, made.yaml())
        files.write(folder / "report.json", json.dumps(made.to_json(), indent=1) + "\n")
    except OSError as error:
        what = f"'{error.filename or folder}' cannot be written: {error.strerror or error}"
        raise InputError(f"{what} (name another --out or --write)") from error
    _show(made, target, folder, namespace.json)
    return 1 if made.searched.outcome.failed else 0


def _declared(namespace: argparse.Namespace) -> Declared:
    """What the file says, and the flags before it. Raises SpecError, and InputError for no or several files."""
    from prunekit_evals.search.declared import read

    from prunekit.errors import InputError

    told = _told(namespace)
    sources = [word for word in namespace.search if not is_override(word)]
    overrides = [*namespace.overrides, *filter(is_override, namespace.search)]
    if len(sources) > 1:
        raise InputError(f"one search at a time, not {len(sources)}: {', '.join(sources)}")
    if not sources and not told:
        raise InputError("name a search file, or --strategies, --model, --tasks and --flops (see docs/search.md)")
    if not sources:
        return read(told, overrides)
    return read(sources[0], [*(f"{key}={json.dumps(value)}" for key, value in told.items()), *overrides])


def _told(namespace: argparse.Namespace) -> dict[str, Any]:
    """The flags as a file would have them."""
    given = vars(namespace)
    told = {key: given[key] for key in PLAIN if given.get(key) is not None}
    for key in LISTS:
        if given[key] is not None:
            told[key] = [one.strip() for one in given[key].split(",") if one.strip()]
    if namespace.flops is not None:
        told["budget"] = {"flops": namespace.flops}
    for key in ("data_root", "include_path"):
        if given[key] is not None:
            told[key] = str(given[key].absolute())
    return told


def _searched(namespace: argparse.Namespace, declared: Declared, folder: Path) -> Any:
    """Run it under a progress bar."""
    from prunekit_evals.cli import commands, progress
    from prunekit_evals.lmms import quiet
    from prunekit_evals.search.session import Session

    plan = _plan(namespace, declared, folder)
    quiet.libraries()
    with progress.Bar(commands.console(stderr=True)) as bar:

        def say(text: str) -> None:
            bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

        return Session(declared, plan, folder, bar, say).run()


def _plan(namespace: argparse.Namespace, declared: Declared, folder: Path) -> Plan:
    """A plan as `prunekit eval` makes it, without pipelines."""
    from dataclasses import asdict

    from prunekit_evals.cli import commands

    told = {**asdict(declared.settings), "tasks": ",".join(declared.settings.tasks)}
    rest = {
        "out": folder / "results", "limit": None, "subset_seed": None, "force": False,
        "no_timing": namespace.no_timing,
    }  # fmt: skip
    return commands.plan_of(argparse.Namespace(**told, **rest, download=namespace.download), ())


def _show(made: Report, target: Path, folder: Path, as_json: bool) -> None:
    from prunekit_evals.cli import commands
    from prunekit_evals.compare import rendering

    if as_json:
        print(json.dumps({**made.to_json(), "file": str(target)}, indent=2))
    else:
        rendering.show(made.table, commands.console())
        print("\n" + "\n".join(made.lines()))
    for cell in made.searched.outcome.failed:
        commands.say(f"failed: {cell.label} {cell.pipeline.name}: {cell.error}")
    commands.say(f"\npipeline: {target}; all figures: {folder}/report.json; cells: prunekit compare {folder}/results")
