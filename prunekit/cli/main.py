"""The `prunekit` program. Commands import what they need when they run, so that `--help` and `list` cost nothing.

Exit codes: 0 done; 2 your input is wrong, as stderr says; 1 a defect of prunekit or a plugin; 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from typing import Any, NoReturn, TextIO

from prunekit import plugins
from prunekit.cli import asked, calibrate, completion, cost, doctor, export, new, run, show, trace, train
from prunekit.cli import list as listing
from prunekit.cli.arguments import take_overrides
from prunekit.errors import PluginError, PrunekitError, PrunekitWarning, did_you_mean
from prunekit.version import VERSION

EPILOG = """\
examples:
  prunekit list strategies
  prunekit show fastv-k2-r25 --model micro
  prunekit validate my.yaml
  prunekit run fastv-k2-r25 --model micro --image cat.png --prompt "Is there a cat?"
"""

Command = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program with these arguments (None: those of the process) and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, TextIOWrapper):  # a terminal that cannot show a letter shall not end the run
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with _plain_warnings(), asked.plugins_of(arguments) as rest:
            code = _run(rest)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read our output has gone; hand the rest, written at exit, to nobody.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13
    except KeyboardInterrupt:
        _say("interrupted")
        return 130
    except Exception as error:
        if "--debug" in arguments:
            traceback.print_exc()
        if isinstance(error, PrunekitError):
            _say(f"error: {error}" if "\n" not in str(error) else f"error:\n{error}")
            return 2
        _say(f"unexpected {type(error).__name__}: {error} (this is a defect; --debug shows where)")
        return 1
    return code


def parser() -> argparse.ArgumentParser:
    """The argument parser with every command, also those of plugins; a plugin that cannot add its own is left out."""
    top = argparse.ArgumentParser(
        prog="prunekit",
        description="Prune visual tokens and layers of Large Vision-Language Models, as a YAML pipeline says.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"prunekit {VERSION}")
    top.add_argument("--debug", action="store_true", help="show the traceback of an error")
    asked.add(top)
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in (listing, show, cost, run, trace, doctor, calibrate, train, export, new, completion):
        module.add(commands)
    for name in plugins.names():
        known, shown = dict(commands.choices), list(commands._choices_actions)
        if plugins.call(name, "prunekit_commands", subparsers=commands) is None:  # and nothing of it stays
            commands.choices.clear()
            commands.choices.update(known)
            commands._choices_actions[:] = shown
    for command in set(commands.choices.values()):
        command.set_defaults(parser=command)
        if "--debug" not in command._option_string_actions:
            command.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        asked.add_misplaced(command)
    commands.choices["completion"].set_defaults(whole=top)
    return top


def _refuse(asked: argparse.ArgumentParser, unknown: Sequence[str]) -> NoReturn:
    """Say which arguments a command does not take, with its own usage, and which of its options may be meant."""
    options = [word.partition("=")[0] for word in unknown if word.startswith("--")]
    near = did_you_mean(options[0], asked._option_string_actions) if options else ""
    asked.error(f"unrecognized arguments: {' '.join(unknown)}{f' ({near.strip()})' if near else ''}")


def _run(arguments: Sequence[str]) -> int:
    top = parser()
    namespace, unparsed = top.parse_known_args(arguments)
    if unknown := take_overrides(namespace, unparsed):
        _refuse(getattr(namespace, "parser", top), unknown)
    command: Command | None = getattr(namespace, "run", None)
    if command is None:
        raise PluginError("this command does nothing: its plugin set no `run`")
    return command(namespace)


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Show prunekit's own warnings as one line, without a file and a line of the code."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", PrunekitWarning)
        usual = warnings.showwarning

        def show(
            message: Any, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None,
            line: str | None = None,
        ) -> None:  # fmt: skip
            if issubclass(category, PrunekitWarning):
                _say(f"warning: {message}")
            else:
                usual(message, category, filename, lineno, file, line)

        warnings.showwarning = show
        yield


def _say(text: str) -> None:
    sys.stderr.write(f"prunekit: {text}\n")


if __name__ == "__main__":
    sys.exit(main())
