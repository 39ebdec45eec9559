"""What PAR is worth on a bundled model: runs the sweeps of docs/studies, and writes the study part of docs/par.md.

    make study                                             # of micro: everything that is missing
    python -m prunekit_evals.studies.par smol               # some hours of one core
    python -m prunekit_evals.studies.par micro limit=4 --parts par-micro --page /tmp/page.md
    python -m prunekit_evals.studies.par micro --render    # computes nothing, writes the text anew

A cell that is there is not computed again. Words such as limit=20 change the sweeps: give them a folder of their own.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prunekit_evals.studies.par import page, train

ROOT = Path(__file__).resolve().parents[3]
SWEEPS = ROOT / "docs" / "studies"
PAGE = ROOT / "docs" / "par.md"
PLUGIN = Path(__file__).parent / "plugin.py"
COMMAND = "python -m prunekit_evals.studies.par"
RUN = ["--skip-infeasible", "--workers", "1", "--threads", "1"]


@dataclass(frozen=True)
class Part:
    """Sweeps over one folder, of whose cells one section is written. needs_routers: those of the ablations."""

    title: str
    sweeps: tuple[str, ...]
    needs_routers: bool = False


STUDIES = {
    "micro": (
        Part("PAR against others at equal FLOPs", ("par-micro", "par-micro-layers")),
        Part("Pairs of layers left out", ("par-micro-pairs",)),
        Part("Selections repeated", ("par-micro-draws",)),
        Part("Ablations of the router", ("par-micro-routers",), needs_routers=True),
    ),
    "smol": (Part("PAR against others at equal FLOPs", ("par-smol", "par-smol-layers")),),
}


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(prog=COMMAND, description=(__doc__ or "").partition("\n\n")[0])
    made.add_argument("study", nargs="?", default="micro", choices=STUDIES, help="a bundled model; default: micro")
    made.add_argument("changes", nargs="*", metavar="KEY=VALUE", help="of the sweep files, such as limit=20")
    made.add_argument("--parts", metavar="SWEEP,...", help="only the parts with these sweeps; default: all")
    made.add_argument("--out", type=Path, default=Path("runs/studies"), metavar="DIR", help="for cells (runs/studies)")
    made.add_argument("--routers", type=Path, default=Path("runs/par"), metavar="DIR", help="those of the ablations")
    made.add_argument("--page", type=Path, default=PAGE, metavar="FILE", help="with the markers; default: docs/par.md")
    made.add_argument("--render", action="store_true", help="compute nothing; write the text from what is there")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, and write. The exit code of the first command that fails."""
    made = parser()
    arguments = made.parse_args(argv)
    parts = _parts(made, arguments.study, arguments.parts)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        os.environ.setdefault(name, "1")
    if not arguments.render and (code := _run(parts, arguments)):
        return code
    from prunekit_evals.run import reading

    found = [reading.read([arguments.out / part.sweeps[0]]) for part in parts]
    if skipped := [one for some in found for one in some.skipped]:
        made.error(f"{skipped[0]} ({len(skipped)} files are no results)")
    sections = [page.section(part.title, some.cells) for part, some in zip(parts, found, strict=True)]
    head = f"Written by `{COMMAND} {' '.join([arguments.study, *arguments.changes])}`, from the cells of its sweeps."
    text = page.Block(f"par-{arguments.study}").into(
        arguments.page.read_text(encoding="utf-8"), "\n\n".join([head, *sections])
    )
    arguments.page.write_text(text, encoding="utf-8")
    print(f"text: {arguments.page}")
    return 0


def _parts(made: argparse.ArgumentParser, study: str, names: str | None) -> list[Part]:
    wanted = [name for name in (names or "").split(",") if name]
    known = {name for part in STUDIES[study] for name in part.sweeps}
    if unknown := sorted(set(wanted) - known):
        made.error(f"no sweep {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    return [part for part in STUDIES[study] if not wanted or set(part.sweeps) & set(wanted)]


def _run(parts: Sequence[Part], arguments: argparse.Namespace) -> int:
    """The routers, then the sweeps, each into the folder of its part."""
    from prunekit import plugins
    from prunekit.cli.main import main as prunekit

    if any(part.needs_routers for part in parts) and (code := train.main(["--routers", str(arguments.routers)])):
        return code
    os.environ["PRUNEKIT_PLUGINS"] = os.pathsep.join(filter(None, [os.environ.get("PRUNEKIT_PLUGINS"), str(PLUGIN)]))
    plugins.reset()
    for part in parts:
        for sweep in part.sweeps:
            out = str(arguments.out / part.sweeps[0])
            if code := prunekit(["sweep", str(SWEEPS / f"{sweep}.yaml"), *arguments.changes, "--out", out, *RUN]):
                return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
