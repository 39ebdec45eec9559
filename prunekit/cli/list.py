"""`prunekit list`: what is installed and registered."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunekit.cli import catalogue

if TYPE_CHECKING:
    from prunekit.registry import Entry

KINDS = ("strategies", "models", "plugins", "pipelines")


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    command = commands.add_parser(
        "list",
        help="strategies, models, plugins and pipelines",
        description="What pipelines can be made of, and where each thing comes from. `list strategies` groups them, "
        "and shows all that is known of a single one; it imports each, `list` alone imports none.",
        epilog="example: prunekit list strategies --site decoder --training-free",
    )
    command.add_argument("kind", nargs="?", choices=KINDS, help="only these; without it, all")
    catalogue.add_filters(command)
    command.add_argument("--dir", type=Path, default=None, metavar="DIR", help="list the pipeline files of this folder")
    command.add_argument("--json", action="store_true", help="machine-readable")
    command.set_defaults(run=run)


def run(namespace: argparse.Namespace) -> int:
    """List what was asked for."""
    if namespace.kind == "strategies":
        return _strategies(namespace)
    if namespace.find or catalogue.chosen(namespace):
        from prunekit.errors import InputError

        raise InputError("only strategies are searched and filtered: `prunekit list strategies WORD... --FILTER`")
    kinds = [namespace.kind] if namespace.kind else list(KINDS)
    listed = {kind: _rows(kind, namespace.dir) for kind in kinds}
    if namespace.json:
        print(json.dumps(listed, indent=2))
        return 0
    for number, (kind, rows) in enumerate(listed.items()):
        print(("\n" if number else "") + kind)
        wide = max((len(row["name"]) for row in rows), default=0)
        for row in rows:
            origin = f"  [{row['origin']}]" if row["origin"] else ""
            file = f"  {row['file']}" if kind == "plugins" and row["file"] else ""
            print(f"  {row['name']:{wide}}  {row['summary']}{origin}{file}")
        if not rows:
            print("  none")
    return 0


def _strategies(namespace: argparse.Namespace) -> int:
    from prunekit import plugins

    rows = catalogue.listed(plugins.registry(), namespace.find, catalogue.chosen(namespace))
    if namespace.json:
        print(json.dumps({"strategies": [row.to_json() for row in rows]}, indent=2))
    else:
        print("\n".join(["strategies", *catalogue.lines(rows)]))
    return 0


def _rows(kind: str, folder: Path | None) -> list[dict[str, Any]]:
    from prunekit import plugins

    if kind == "pipelines" and folder is not None:
        return [_pipeline(path) for path in pipeline_files(folder)]
    if kind == "plugins":
        return [
            {**asdict(one), "summary": f"broken: {one.broken}" if one.broken else ", ".join(one.hooks)}
            for one in plugins.described()
        ]
    registry = plugins.registry()
    if kind == "pipelines":
        return [{**_pipeline(Path(entry.target)), **_registered(entry)} for entry in registry.pipelines()]
    entries = registry.strategies() if kind == "strategies" else registry.models()
    return [{**asdict(one), "summary": one.summary or one.target} for one in entries]


def pipeline_files(folder: Path) -> list[Path]:
    """The pipeline files of `folder`. Raises InputError when it is none."""
    from prunekit.errors import InputError

    if not folder.is_dir():
        raise InputError(f"no such folder: '{folder}'")
    return sorted(path for path in folder.iterdir() if path.suffix in (".yaml", ".yml"))


def _registered(entry: Entry) -> dict[str, Any]:
    """What a registered pipeline says instead of its file: the name that finds it, and who brought it."""
    about = {"name": entry.name, "origin": entry.origin, "plugin": entry.plugin, "file": entry.target}
    return about | ({"summary": entry.summary} if entry.summary else {})


def _pipeline(path: Path) -> dict[str, Any]:
    from prunekit.spec import schema

    read, faults = schema.read(path)
    if faults:
        summary = f"broken: {faults[0].message}; see `prunekit validate {path}`"
    else:
        summary = read.description or _first_comment(path)
    return {"name": read.name, "summary": summary, "origin": str(path), "faults": len(faults)}


def _first_comment(path: Path) -> str:
    with path.open(encoding="utf-8-sig") as stream:
        line = stream.readline().strip()
    return line.lstrip("# ") if line.startswith("#") else ""
