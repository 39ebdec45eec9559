"""`prunekit results`: results as CSV, Parquet or JSON for other programs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from prunekit_evals.cli.arguments import add_results

if TYPE_CHECKING:
    from prunekit_evals.run.export import Row

EXAMPLES = """\
examples:
  prunekit results results > cells.csv
  prunekit results ours theirs --questions --parquet answers.parquet
"""


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    command = commands.add_parser(
        "results",
        help="results as CSV, Parquet or JSON",
        description="Results for other programs: a row for each cell with all that its file holds, or for each\n"
        "question with its text, target, answer and score. Without a file CSV goes to the standard output.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_results(command)
    command.add_argument("--questions", action="store_true", help="a row for each question instead of each cell")
    target = command.add_mutually_exclusive_group()
    target.add_argument("--csv", type=Path, metavar="FILE", help="write CSV; lists are JSON in it")
    target.add_argument("--parquet", type=Path, metavar="FILE", help="write Parquet")
    target.add_argument("--json", type=Path, metavar="FILE", help="write JSON: a list with an object for each row")
    command.set_defaults(run=run)


def run(namespace: argparse.Namespace) -> int:
    """Read and write."""
    from prunekit_evals.cli import commands
    from prunekit_evals.run import export, files, reading

    from prunekit.errors import InputError

    _check(namespace)
    found = reading.read(namespace.results)
    for one in found.skipped:
        commands.say(f"skipped: {one}")
    cells = sorted(found.cells, key=lambda cell: (cell.created, cell.label, cell.pipeline.name))
    rows = export.of_questions(cells) if namespace.questions else export.of_cells(cells)
    if not rows:
        what = "questions" if cells else "results"
        folders = ", ".join(f"'{path}'" for path in namespace.results)
        skipped = f"{len(found.skipped)} files skipped"
        raise InputError(f"no {what} under {folders}, {skipped} (make some with `prunekit eval`)")
    target = namespace.csv or namespace.parquet or namespace.json
    if target is None:
        print(_csv(rows), end="")
        return 0
    with files.saving(target):
        files.write(target, (_csv if namespace.csv else _parquet if namespace.parquet else _json)(rows))
    more = f", {len(found.skipped)} files skipped (named above)" if found.skipped else ""
    commands.say(f"{len(rows)} rows: {target}{more}")
    return 0


def _check(namespace: argparse.Namespace) -> None:
    """Raise InputError for what would fail after the work."""
    from importlib.util import find_spec

    from prunekit.errors import InputError

    lacking = [name for name in ("pandas", *["pyarrow"] * bool(namespace.parquet)) if find_spec(name) is None]
    if lacking:
        raise InputError(f"results are written by {' and '.join(lacking)}: pip install 'prunekit[evals]'")
    for option in ("csv", "parquet", "json"):
        path = getattr(namespace, option)
        if path is not None and path.is_dir():
            raise InputError(f"--{option} {path}: that is a folder; name a file in it")
        if path is not None and not path.absolute().parent.is_dir():
            raise InputError(f"--{option} {path}: there is no folder '{path.parent}' (make it first)")


def _csv(rows: list[Row]) -> str:
    import json

    import pandas

    plain = [{key: json.dumps(one) if isinstance(one, list) else one for key, one in row.items()} for row in rows]
    return str(pandas.DataFrame(plain).convert_dtypes().to_csv(index=False))


def _json(rows: list[Row]) -> str:
    import pandas

    # As objects, so that whole numbers stay whole beside missing ones.
    return str(pandas.DataFrame(rows, dtype=object).to_json(orient="records", indent=1, force_ascii=False)) + "\n"


def _parquet(rows: list[Row]) -> bytes:
    import pandas

    content = pandas.DataFrame(rows).convert_dtypes().to_parquet(index=False)
    assert isinstance(content, bytes)
    return content
