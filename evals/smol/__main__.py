"""Assemble prunekit-smol and say where it is: `python -m prunekit_evals.smol`; `make smol` calls it."""

from __future__ import annotations

import sys

from prunekit_evals.smol import model_path

from prunekit.errors import PrunekitError


def main() -> int:
    """The command; returns its exit code."""
    try:
        folder = model_path()
    except PrunekitError as error:
        sys.stderr.write(f"prunekit: error: {error}\n")
        return 2
    print(f"{folder}\nprunekit-smol is assembled; every command takes it as `--model smol`")
    return 0


if __name__ == "__main__":
    sys.exit(main())
