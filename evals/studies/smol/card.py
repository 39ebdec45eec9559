"""Write the tables of prunekit-smol's model card anew: `python -m prunekit_evals.studies.smol.card`.

docs/smol.md takes them from what a training run measured: docs/smol-measured.json and docs/smol-curve.jsonl. `--run
FOLDER` first ships a run: these files and the weights are replaced by its own, all three, so that they stay of one run.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from prunekit_evals.bench.cpu import into
from prunekit_evals.smol.assemble import PARTS, TRAINED
from prunekit_evals.studies.smol import card_tables as tables
from prunekit_evals.studies.smol.record import load

DOCS = Path(__file__).resolve().parents[3] / "docs"
PAGE, MEASURED, CURVE = DOCS / "smol.md", DOCS / "smol-measured.json", DOCS / "smol-curve.jsonl"
OF_RUN = {"measured.json": MEASURED, "curve.jsonl": CURVE, "joint.safetensors": PARTS / TRAINED}


def blocks() -> dict[str, str]:
    """Every table by its mark in the page."""
    record, curve = load(MEASURED), tables.lines(CURVE)
    return {
        "accuracy": tables.accuracy(record), "single": tables.single(record), "sets": tables.sets(record),
        "tokens": tables.tokens(record), "curve": tables.curve(curve), "stages": tables.stages(curve),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, metavar="FOLDER", help="ship this training run, which was measured")
    run: Path | None = parser.parse_args().run
    if run:
        if lacking := [name for name in OF_RUN if not (run / name).is_file()]:
            parser.error(f"'{run}' lacks {' and '.join(lacking)}; name the --out folder of a whole run")
        for name, kept in OF_RUN.items():
            shutil.copyfile(run / name, kept)
    PAGE.write_text(into(PAGE.read_text(), blocks()))
    print(PAGE)


if __name__ == "__main__":
    main()
