"""`-p`, `--plugin`: which loose plugins a call of the program loads, and which plugins it blocks.

They stand before the command, since plugins bring commands; they go into the environment, so that processes which the
command starts load and block the same.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prunekit import plugins
from prunekit.errors import InputError, did_you_mean

BEFORE = "-p and --plugin stand before the command: prunekit --plugin ./mine.py eval ..."
BLOCK = "no:"


def add(parser: argparse.ArgumentParser) -> None:
    """The option, which may be repeated."""
    parser.add_argument(
        "-p", "--plugin", action="append", default=[], metavar="FILE|no:NAME",
        help="load a plugin that is not installed, a .py file or a folder with an __init__.py; with no:, block one by "
        "its name in `prunekit list plugins`; may be repeated",
    )  # fmt: skip


def add_misplaced(command: argparse.ArgumentParser) -> None:
    """Let a command say where the option belongs, unless it has one of that name for itself."""
    free = [option for option in ("-p", "--plugin") if option not in command._option_string_actions]
    if free:
        command.add_argument(*free, action=_Misplaced, help=argparse.SUPPRESS)


class _Misplaced(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        parser.error(BEFORE)


@contextmanager
def plugins_of(arguments: Sequence[str]) -> Iterator[list[str]]:
    """Load and block what the options before the command say, while the block runs; yields the other arguments.

    Raises InputError for files and names that do not exist.
    """
    early = argparse.ArgumentParser(prog="prunekit", add_help=False, allow_abbrev=False)
    add(early)
    early.add_argument("rest", nargs=argparse.REMAINDER)
    found, others = early.parse_known_args(arguments)
    rest = [*others, *found.rest]
    if not found.plugin:
        yield rest
        return
    blocked = [text.removeprefix(BLOCK) for text in found.plugin if text.startswith(BLOCK)]
    files = [_file(text) for text in found.plugin if not text.startswith(BLOCK)]
    before = {name: os.environ.get(name) for name in (plugins.DISABLED, plugins.LOOSE)}
    _extend(plugins.DISABLED, blocked, ",")
    _extend(plugins.LOOSE, files, os.pathsep)
    plugins.reset()
    try:
        _refuse_strangers(blocked)
        yield rest
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        plugins.reset()


def _file(text: str) -> str:
    path = Path(text).expanduser().absolute()
    if not path.exists():
        raise InputError(f"--plugin {text}: there is no such file or folder (no:NAME blocks a plugin)")
    if os.pathsep in str(path):
        raise InputError(f"--plugin {text}: a path with '{os.pathsep}' cannot stand in {plugins.LOOSE}: rename it")
    return str(path)


def _extend(name: str, words: Sequence[str], separator: str) -> None:
    if words:
        os.environ[name] = separator.join(filter(None, [os.environ.get(name, ""), *words]))


def _refuse_strangers(blocked: Sequence[str]) -> None:
    """A misspelt name would block nothing, silently."""
    skipped = plugins.manager().skipped
    for name in blocked:
        if name not in skipped:
            known = sorted({*plugins.names(), *skipped})
            raise InputError(
                f"-p no:{name}: no plugin has this name ({did_you_mean(name, known)}known: {', '.join(known)})"
            )
