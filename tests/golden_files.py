"""Reads `tests/goldens/*.json`, what authors' own selection code returned for seeded inputs, and draws the inputs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

GOLDENS = Path(__file__).parent / "goldens"


def golden_cases(name: str) -> list[dict]:
    """All cases of one file. A missing file fails."""
    return json.loads((GOLDENS / f"{name}.json").read_text(encoding="utf-8"))["cases"]


def drawn(case: dict, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The input tensors, float64 draws rounded to float32 as the authors' code got them, then cast to `dtype`."""
    rng, tensors = np.random.default_rng(case["seed"]), {}
    for entry in case["draws"]:
        draw = rng.standard_normal if entry["draw"] == "standard_normal" else rng.random
        x = entry["scale"] * draw(tuple(entry["shape"])) + entry["offset"]
        if entry["then"] == "causal_softmax":
            x = np.where(np.tril(np.ones(x.shape[-2:], bool)), x, -np.inf)
        if entry["then"] != "none":
            x = np.exp(x - x.max(-1, keepdims=True))
            x /= x.sum(-1, keepdims=True)
        x = x.astype(np.float32)
        check = entry["check"]
        assert np.allclose([*x.flat[:3], x.flat[-1]], [*check["first3"], check["last"]], rtol=1e-5), "another stream"
        assert np.isclose(x.astype(np.float64).sum(), check["sum"], rtol=1e-4)
        tensors[entry["name"]] = torch.from_numpy(x).to(dtype)
    return tensors
