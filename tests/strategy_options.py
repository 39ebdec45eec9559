"""What registered strategies need beside their names, for tests that meet all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny_clip

import prunekit
from prunekit import ModelShape
from prunekit.strategy.artefact import Artefact

# One that is missing here and cannot be built without options fails by name.
OPTIONS: dict[str, dict[str, Any]] = {
    "skip_layers": {"layers": [1, 4]},
    "freeze_layers": {"layers": [1, 4]},
    "par": {"weights": None, "seed": 0, "width": 32},
    "shortgpt": {"drop": 2},
    "shortv": {"freeze": 2},
}
# Those that read the question with the CLIP model that the tower was taken from.
PAIRED = ("trim", "cdpruner")


def results(layers: int) -> dict[str, dict[str, Any]]:
    """By strategy, what a calibration of a model with so many layers might have found."""
    return {
        "shortv": {"divergence": {str(layer): float(layer) for layer in range(layers)}},
        "shortgpt": {"influence": [float(layer) for layer in range(layers)]},
        "fitprune": {"reduction": 0.6, "alpha": 0.5, "left": [1.0, *(1 / (1 + layer) for layer in range(1, layers))]},
    }


def options_for(shape: ModelShape, folder: Path) -> dict[str, dict[str, Any]]:
    """`OPTIONS`, with calibrations of a model with these numbers and the CLIP model of a tiny LLaVA, in `folder`."""
    found = {name: dict(options) for name, options in OPTIONS.items()}
    about = {"id": "tiny", "family": shape.family, "layers": shape.layers, "hidden": shape.hidden}
    for name, result in results(shape.layers).items():
        path = folder / f"{shape.family}-{name}.json"
        Artefact(prunekit.__version__, name, about, {"name": "none"}, result).write(path)
        found.setdefault(name, {})["calibration"] = str(path)
    clip = folder / "clip"
    if not clip.exists():
        tiny_clip.write(clip)
    return found | {name: {**found.get(name, {}), "clip": str(clip)} for name in PAIRED}
