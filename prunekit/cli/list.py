"""`prunekit list`: what is installed and registered."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

KINDS = ("strategies", "models", "plugins", "pipelines")


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    command = commands.add_parser(
        "list",
        help="strategies, models, plugins and pipeline files",
        description="What pipelines can be made of, and where each thing comes from. Imports no strategy.",
        epilog="example: prunekit list strategies --json",
    )
    command.add_argument("kind", nargs="?", choices=KINDS, help="only these; without it, all")
    command.add_argument("--dir", type=Path, default=None, metavar="DIR", help="where pipeline files are looked for")
    command.add_argument("--json", action="store_true", help="machine-readable")
    command.set_defaults(run=run)


def run(namespace: argparse.Namespace) -> int:
    """List what was asked for."""
    kinds = [namespace.kind] if namespace.kind else list(KINDS)
    found = {kind: _rows(kind, namespace.dir) for kind in kinds}
    if namespace.json:
        print(json.dumps(found, indent=2))
        return 0
    for number, (kind, rows) in enumerate(found.items()):
        print(("\n" if number else "") + kind)
        wide = max((len(row["name"]) for row in rows), default=0)
        for row in rows:
            print(f"  {row['name']:{wide}}  {row['summary']}" + (f"  [{row['origin']}]" if row["origin"] else ""))
        if not rows:
            print("  none")
    return 0


def _rows(kind: str, folder: Path | None) -> list[dict[str, Any]]:
    from prunekit import plugins

    if kind == "pipelines":
        return [_pipeline(path) for path in pipeline_files(folder)]
    if kind == "plugins":
        return [
            {"name": name, "summary": ", ".join(hooks), "origin": origin, "hooks": hooks}
            for name, origin, hooks in plugins.described()
        ]
    registry = plugins.registry()
    entries = registry.strategies() if kind == "strategies" else registry.models()
    return [{**asdict(one), "summary": one.summary or one.target} for one in entries]


def pipeline_files(folder: Path | None = None) -> list[Path]:
    """The pipeline files of `folder`; None: of `docs/pipelines` here, else in the checkout, else of this folder.

    Raises InputError when `folder` is none.
    """
    from prunekit.errors import InputError

    if folder is not None and not folder.is_dir():
        raise InputError(f"no such folder: '{folder}'")
    checkout = Path(__file__).resolve().parents[2] / "docs" / "pipelines"
    usual = [Path("docs/pipelines"), checkout, Path()]
    chosen = folder or next(path for path in usual if path.is_dir())
    return sorted(path for path in chosen.iterdir() if path.suffix in (".yaml", ".yml"))


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
