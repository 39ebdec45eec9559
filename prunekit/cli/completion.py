"""`prunekit completion`: a script by which a shell completes commands, options, files and names of pipelines."""

from __future__ import annotations

import argparse
from typing import Any

SHELLS = ("bash", "zsh", "tcsh")
WAYS = """\
bash:  prunekit completion bash > ~/.local/share/bash-completion/completions/prunekit
zsh:   prunekit completion zsh > ~/.zfunc/_prunekit    (a folder of $fpath, before compinit)
tcsh:  prunekit completion tcsh >> ~/.cshrc
Names of pipelines are those of today: write it again after installing a plugin.
"""


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    command = commands.add_parser(
        "completion",
        help="a script that completes commands, options and pipelines in your shell",
        description="Writes the script to stdout. It is made by shtab: pip install 'prunekit[completion]'.",
        epilog=WAYS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("shell", choices=SHELLS)
    command.set_defaults(run=run)  # and `whole`, the parser of all commands, when all are there


def run(namespace: argparse.Namespace) -> int:
    """Print the script."""
    from prunekit import plugins
    from prunekit.errors import InputError

    try:
        import shtab
    except ImportError as error:
        raise InputError("completion needs shtab: pip install 'prunekit[completion]'") from error
    top: argparse.ArgumentParser = namespace.whole
    names = " ".join(sorted(entry.name for entry in plugins.registry().pipelines()))
    _mark(top, shtab.FILE)
    print(shtab.complete(top, namespace.shell, preamble=_preamble(names)))
    return 0


def _mark(parser: argparse.ArgumentParser, file: Any) -> None:
    """Say of each argument what it is: pipelines, or files."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in dict.fromkeys(action.choices.values()):
                _mark(command, file)
        elif action.dest in ("pipeline", "pipelines"):
            action.complete = dict.fromkeys(("bash", "zsh"), PIPELINES)  # type: ignore[attr-defined]
        elif str(action.metavar) in ("FILE", "DIR", "RESULTS"):
            action.complete = file  # type: ignore[attr-defined]


PIPELINES = "_prunekit_pipelines"


def _preamble(names: str) -> Any:
    """Functions that complete a pipeline: a name, or a file."""
    return {
        "bash": f'{PIPELINES}() {{ compgen -W "{names}" -- "$1"; compgen -f -- "$1"; }}',
        "zsh": f"{PIPELINES}() {{ _alternative 'names:name:({names})' 'files:file:_files'; }}",
    }
