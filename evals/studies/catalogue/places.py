"""Where the catalogue's files are, in a checkout."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
CARDS = ROOT / "docs" / "strategies"
IMAGES = CARDS / "images"
MEASURED = CARDS / "micro.json"
GOLDENS = ROOT / "tests" / "goldens"
REPRODUCE = ROOT / "docs" / "reproduce"
REPORTED = Path(__file__).parent / "reported.yaml"
COMMAND = "python -m prunekit_evals.studies.catalogue"
