"""`prunekit leaderboard`: results as a ranking, in the terminal, as Markdown and as one page."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from prunekit_evals.cli.arguments import add_results

if TYPE_CHECKING:
    from collections.abc import Mapping

    from prunekit_evals.leaderboard.board import Board
    from prunekit_evals.leaderboard.pictures import Picture
    from prunekit_evals.run.reading import Found

EXAMPLES = """\
examples:
  prunekit leaderboard results -o board.html
  prunekit leaderboard ours theirs -o board.html --markdown board.md
"""
PAGE, MARKDOWN = (".html", ".htm"), (".md", ".markdown")


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    command = commands.add_parser(
        "leaderboard",
        help="results as a ranking in one page",
        description="A ranking of results: accuracy against executed FLOPs and measured time, with intervals, each\n"
        "task, and behind every row its pipeline, its command and its record. The page needs no network.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_results(command)
    command.add_argument("-o", "--out", type=Path, metavar="FILE", help="write the page: a name that ends in .html")
    command.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables: a name that ends in .md")
    command.add_argument(
        "--keep-maps", type=Path, metavar="DIR",
        help="show these pictures on the page: `prunekit trace NAME... --thumbnails DIR` makes one of each pipeline",
    )  # fmt: skip
    command.set_defaults(run=run)


def run(namespace: argparse.Namespace) -> int:
    """Read, rank, show, write."""
    from prunekit_evals.cli import commands
    from prunekit_evals.leaderboard import board, pictures
    from prunekit_evals.run import reading

    from prunekit.errors import InputError

    _check(namespace)
    maps = pictures.read(namespace.keep_maps) if namespace.keep_maps else pictures.Pictures()
    found = reading.read(namespace.results)
    for one in (*found.skipped, *maps.skipped):
        commands.say(f"skipped: {one}")
    made = board.of_cells(found.cells)
    if not made.sections:
        raise InputError(_nothing(namespace, found))
    show(made)
    write(made, namespace.out, namespace.markdown, maps.of)
    if found.skipped:
        commands.say(f"{made.cells} cells on the board, {len(found.skipped)} files skipped (named above)")
    return 0


def show(made: Board) -> None:
    """Every section in the terminal, and what it lacks."""
    from prunekit_evals.cli import commands
    from prunekit_evals.compare import rendering

    for section in made.sections:
        rendering.show(section.table, commands.console())
        for missing in section.missing:
            print(f"note: {missing}")


def write(made: Board, page: Path | None, markdown: Path | None, maps: Mapping[str, Picture] | None = None) -> None:
    """The files that were asked for. Raises InputError where one cannot be written."""
    from prunekit_evals.cli import commands
    from prunekit_evals.leaderboard import page as pages
    from prunekit_evals.leaderboard import text

    if markdown is not None:
        _write(markdown, text.markdown(made))
    if page is not None:
        html = pages.html(made, maps)
        _write(page, html)
        size = len(html.encode())
        large = f"; more than {pages.LIMIT / 1e6:.0f} MB: rank fewer folders at once" if size > pages.LIMIT else ""
        commands.say(f"page: {page} ({size / 1e6:.2f} MB{large})")


def _check(namespace: argparse.Namespace) -> None:
    """Raise InputError for what would fail after the work."""
    import os
    from importlib.util import find_spec

    from prunekit_evals.cli import commands

    from prunekit.errors import InputError

    commands.need_rich()
    commands.need_scipy()
    for option, path, suffixes in (("-o", namespace.out, PAGE), ("--markdown", namespace.markdown, MARKDOWN)):
        if path is None:
            continue
        if path.suffix not in suffixes:
            raise InputError(f"{option} {path}: name a file that ends in {suffixes[0]}")
        if path.is_dir():
            raise InputError(f"{option} {path}: that is a folder; name a file in it")
        if not path.absolute().parent.is_dir():
            raise InputError(f"{option} {path}: there is no folder '{path.parent}' (make it first)")
        if not os.access(path.absolute().parent, os.W_OK):
            raise InputError(f"{option} {path}: nothing can be written into '{path.parent}' (name another folder)")
    lacking = [name for name in ("altair", "jinja2", "vl_convert") if find_spec(name) is None]
    if namespace.out is not None and lacking:
        raise InputError(f"the page needs {', '.join(lacking)}: pip install 'prunekit[leaderboard]' (or leave -o out)")


def _nothing(namespace: argparse.Namespace, found: Found) -> str:
    folders = ", ".join(f"'{path}'" for path in namespace.results)
    failed = f", {len(found.cells)} cells failed" if found.cells else ""
    skipped = f", {len(found.skipped)} files skipped" if found.skipped else ""
    return f"nothing to rank under {folders}{failed}{skipped} (make results with `prunekit eval`)"


def _write(path: Path, text: str) -> None:
    from prunekit_evals.run import files

    from prunekit.errors import InputError

    try:
        files.write(path, text)
    except OSError as error:
        raise InputError(f"'{path}' cannot be written: {error.strerror} (name another file)") from error
