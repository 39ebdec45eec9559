"""Counts a full run of the matrix and writes its table into docs/exactness.md.

PRUNEKIT_EXACTNESS=cells.jsonl python -m pytest tests/engine/test_matrix.py
python tests/engine/exactness_table.py cells.jsonl
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from matrix import CELLS, FAMILIES, GROUPS, WAYS

HERE = Path(__file__).parent
RESULTS = HERE / "exactness_results.json"
DOCS = HERE.parent.parent / "docs" / "exactness.md"
BEGIN, END = "<!-- matrix: begin -->", "<!-- matrix: end -->"
COLUMNS = (*GROUPS, "video", *WAYS)


def counted(lines):
    """Results from the lines of a full run. Raises SystemExit when a cell is missing or unknown."""
    import torch
    import transformers

    found = {one["cell"]: one["error"] for one in map(json.loads, lines)}
    cells = {str(cell): cell for cell in CELLS}
    if missing := cells.keys() ^ found.keys():
        raise SystemExit(f"{len(missing)} cells are missing or unknown, such as {sorted(missing)[:5]}")
    families = {family: {} for family in FAMILIES}
    for name, cell in cells.items():
        one = families[cell.family].setdefault(cell.group, {"cells": 0, "refused": 0, "error": 0.0})
        one["cells"] += 1
        one["refused"] += found[name] is None
        one["error"] = max(one["error"], float(f"{found[name] or 0.0:.0e}"))
    versions = {"transformers": transformers.__version__, "torch": torch.__version__.partition("+")[0]}
    return {"cells": len(cells), **versions, "families": families}


def table(results):
    """Markdown: a family a row, a group a column."""
    families = results["families"]
    rows = [["family", *COLUMNS], ["---"] * (len(COLUMNS) + 1)]
    for family, groups in families.items():
        rows.append([f"`{family}`", *(_entry(groups.get(column)) for column in COLUMNS)])
    exact = max(one["error"] for row in families.values() for group, one in row.items() if group != "float32")
    refused = sum(one["refused"] for row in families.values() for one in row.values())
    return "\n".join([
        f"{results['cells']} cells, of which {refused} are refused as they should be; transformers "
        f"{results['transformers']}, torch {results['torch']}. Largest error in float64: {exact:.0e}. Each entry: "
        "cells run, largest error, cells refused.",
        "",
        *("| " + " | ".join(row) + " |" for row in rows),
    ])  # fmt: skip


def _entry(one):
    if one is None:
        return "–"
    ran = one["cells"] - one["refused"]
    parts = [f"{ran}: {one['error']:.0e}"] * (ran > 0) + [f"{one['refused']} refused"] * (one["refused"] > 0)
    return ", ".join(parts)


def main(path):
    """Write both files."""
    results = counted(Path(path).read_text(encoding="utf-8").splitlines())
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    text = DOCS.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    DOCS.write_text(before + BEGIN + "\n" + table(results) + "\n" + END + rest.split(END)[1], encoding="utf-8")
    print(f"{results['cells']} cells counted into {DOCS.name}")


if __name__ == "__main__":
    main(sys.argv[1])
