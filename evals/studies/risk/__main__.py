"""Measure what a budget of risk promises and saves, and write the tables of docs/risk.md.

    python -m prunekit_evals.studies.risk collect par-risk.yaml --name micro --data micro-scenes easy-vqa
    python -m prunekit_evals.studies.risk write      # measure nothing, write the tables anew

easy-vqa comes with `pip install 'prunekit[micro]'`. What is collected is kept as docs/risk-NAME.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from prunekit_evals.studies.risk import collect, replay, tables

DOCS = Path(__file__).parents[3] / "docs"


def written(page: str, files: dict[str, Path]) -> str:
    """The page with the tables of each file between its marks."""
    for name, path in files.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, _, rest = page.partition(begin)
        _, found, after = rest.partition(end)
        if not found:
            raise ValueError(f"the page has no {begin} ... {end}")
        page = f"{before}{begin}\n{tables.text(*replay.read(path))}\n{end}{after}"
    return page


def files() -> dict[str, Path]:
    """What has been collected, by name."""
    return {path.stem.removeprefix("risk-"): path for path in sorted(DOCS.glob("risk-*.json"))}


def main() -> None:
    """Collect, or write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    asked = commands.add_parser("collect", help="answer every prompt on every rung")
    asked.add_argument("pipeline", help="a pipeline with a budget of risk")
    asked.add_argument("--name", required=True, help="of the tables")
    asked.add_argument("--model", default="micro")
    asked.add_argument("--data", nargs="+", default=["micro-scenes"], metavar="D", help="sources; the first calibrates")
    asked.add_argument("--prompts", type=int, default=600, metavar="N", help="of each source (600)")
    commands.add_parser("write", help="write the tables")
    arguments = parser.parse_args()
    if arguments.command == "collect":
        path = DOCS / f"risk-{arguments.name}.json"
        collect.write(path, arguments.pipeline, arguments.model, arguments.data, arguments.prompts)
    else:
        page = DOCS / "risk.md"
        page.write_text(written(page.read_text(encoding="utf-8"), files()), encoding="utf-8")


if __name__ == "__main__":
    main()
