"""The table of rules in docs/testing.md: which there are, and for which kinds of strategies.

    python tests/contract/rules_table.py            # after a change
"""

from __future__ import annotations

import re
from pathlib import Path

from kinds import KINDS

from prunekit.testing.checks import CHECKS
from prunekit.testing.subject import Traits

PAGE = Path(__file__).parent.parent.parent / "docs" / "testing.md"
BLOCK = re.compile(r"(<!-- rules: begin -->\n).*?(<!-- rules: end -->)", re.S)
COLUMNS = {"token": "tokens", "image": "images", "layer": "layers", "router": "routers"}


def table() -> str:
    """A row for each rule."""
    every = [Traits.of(cls) for cls, _ in KINDS.values()]
    lines = [f"| rule | what it means | {' | '.join(COLUMNS.values())} |", "| --- | --- |" + " :-: |" * len(COLUMNS)]
    for one in CHECKS:
        marks = ["\u2713" if any(one.concerns(it) for it in every if it.kind == kind) else "" for kind in COLUMNS]
        lines.append(f"| `{one.name}` | {one.means} | {' | '.join(marks)} |")
    return "\n".join(lines) + "\n"


def written() -> str:
    """The table that stands on the page."""
    found = BLOCK.search(PAGE.read_text(encoding="utf-8"))
    assert found is not None
    return found[0].removeprefix("<!-- rules: begin -->\n").removesuffix("<!-- rules: end -->")


def main() -> None:
    """Write it."""
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(BLOCK.sub(lambda match: f"{match[1]}{table()}{match[2]}", page), encoding="utf-8")


if __name__ == "__main__":
    main()
