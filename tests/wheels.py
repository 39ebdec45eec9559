"""Builds the wheel of this checkout."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = {"prunekit": "prunekit", "strategies": "prunekit_strategies", "evals": "prunekit_evals"}


def build(out: Path) -> Path:
    """The wheel, in the empty folder `out`: from a copy, so that nothing is written into the checkout and nothing stale
    in it gets in.
    """
    with tempfile.TemporaryDirectory() as copy:
        source = Path(copy)
        for folder in PACKAGES:
            shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, source)
        command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "would be ignored" not in said, f"setuptools takes folders of data for packages: {said}"
    (built,) = out.glob("*.whl")
    return built
