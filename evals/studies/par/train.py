"""Train the routers of the ablations that are missing, with which `make study` begins.

All are trained alike, briefly, on the preset's sites with one layer left out, but for what their line says.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from prunekit.cli.main import main as prunekit

PIPELINE = Path(__file__).resolve().parents[3] / "strategies" / "pipelines" / "par.yaml"
COMMAND = "python -m prunekit_evals.studies.par.train"
LAYERS = "stages[0].keep_layers"
# What differs for each, as options of `prunekit train`.
OPTIONS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "plain-1": ("--set", "stages[0].seed=1", "--train", "seed=1"),
    "no-noise": ("--train", "noise=1e-9"),
    "tokens-only": ("--set", f"{LAYERS}=null"),
    "layers-only": ("--set", "stages[0].at=null", "--set", f"{LAYERS}=0.5", "--set", "budget=null"),
    "depth-2": ("--set", "stages[0].depth=2"),
    "causal": ("--set", "stages[0].attention=causal"),
    "dpo": ("--train", "loss=dpo", "--train", "beta=5"),
}


def command(name: str, out: Path, steps: int) -> list[str]:
    """The arguments of `prunekit` that train the router of this name."""
    return [
        "train", str(PIPELINE), "--model", "micro", "--data", "micro-scenes", "--dtype", "float32", "--out", str(out),
        "--set", "stages[0].weights=null", "--set", f"{LAYERS}=7", "--train", f"steps={steps}", "--train", "rounds=6",
        "--train", f"measure_every={max(steps, 1)}", *OPTIONS[name],
    ]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Train what is missing; the exit code of the first that fails."""
    made = argparse.ArgumentParser(prog=COMMAND, description=(__doc__ or "").partition("\n")[0])
    made.add_argument("names", nargs="*", help=f"of {', '.join(OPTIONS)}; default: all")
    made.add_argument("--steps", type=int, default=40, metavar="N", help="of the optimizer (40)")
    made.add_argument("--routers", type=Path, default=Path("runs/par"), metavar="DIR", help="where they go")
    arguments = made.parse_args(argv)
    names = arguments.names or list(OPTIONS)
    if unknown := set(names) - set(OPTIONS):
        made.error(f"no router {', '.join(sorted(unknown))}; there are {', '.join(OPTIONS)}")
    for name in names:
        folder = arguments.routers / name
        if (folder / "config.json").is_file():
            print(f"{folder} is there")
        elif code := prunekit(command(name, folder, arguments.steps)):
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
