"""Calibrations made up by hand, for tests of budgets of risk."""

from __future__ import annotations

from pathlib import Path

import prunekit
from prunekit.pipeline import risk
from prunekit.strategy.artefact import Artefact

LADDER = [{"keep": 0.75}, {"keep": 0.5}, {"keep": 0.25}]
ROUTED = [{"keep": 0.5}, {"keep": 0.5, "keep_layers": 5}, {"keep": 0.25, "keep_layers": 4}]
PAR = {"use": "par", "weights": None, "seed": 0, "width": 16, "at": 2}
FASTV = {"use": "fastv", "at": 2}


def pipeline(stage, ladder, **budget) -> prunekit.Pipeline:
    """One with a budget of risk, by default of an even half with confidence 0.5, which two prompts can certify."""
    told = {"risk": 0.5, "confidence": 0.5, "ladder": ladder, **budget}
    return prunekit.load({"name": "risky", "budget": told, "stages": [stage]})


def artefact(made: prunekit.Pipeline, shape, critical, dtype="float64", **changes) -> Artefact:
    """What a calibration of `made` would have written with these critical harms."""
    model = {"id": "0123456789ab", "family": shape.family, "layers": shape.layers, "hidden": shape.hidden}
    told = {"dtype": dtype, "max_new_tokens": 8, **made.budget.ladder_data(), "agreement": []}
    parts = {"model": model, "data": {"prompts": len(critical)}, "result": risk.result_of(made.base, critical, told)}
    return Artefact("0", risk.KIND, **{**parts, **changes})


def calibrated(folder: Path, stage, ladder, shape, limit: float, **budget) -> prunekit.Pipeline:
    """A pipeline whose samples take rungs while their harm is below `limit`."""
    path = folder / "risk.json"
    artefact(pipeline(stage, ladder), shape, [limit] * 20).write(path)
    return pipeline(stage, ladder, calibration=str(path), **budget)
