"""What the study compares: settings, strategies, routers. Nothing is measured here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "par.md"
RESULTS = ROOT / "docs" / "par-study.json"
PIPELINE = ROOT / "docs" / "pipelines" / "par.yaml"
CLAIM = 2.3  # speed-up that is claimed for PAR
TARGET_KEPT, TARGET_FLOPS = 0.98, 0.5  # of dense accuracy, at this fraction of dense FLOPs
OVERHEAD = 0.03  # of dense prefill that a router may cost at the 7B shape


@dataclass(frozen=True)
class Setting:
    """PAR with all the tokens that fit into `flops`, a fraction of dense prefill, while `layers` decoder layers run."""

    flops: float
    layers: int

    def __str__(self) -> str:
        return f"{100 * self.flops:.0f} % of FLOPs, L={self.layers}"


# FLOPs and how many layers each sample skips.
SETTINGS = ((0.6, 1), (0.5, 0), (0.5, 1), (0.4, 0))
# Of these the ones at which ablations are compared: without and with skipped layers at equal FLOPs.
COMPARED = (1, 2)


def settings_for(layers: int) -> tuple[Setting, ...]:
    """The settings of the study on a model of so many layers."""
    return tuple(Setting(flops, layers - skipped) for flops, skipped in SETTINGS)


# T and L of the paper's table, of 576 tokens and 32 layers.
PAPER = ((256, 28), (176, 28), (144, 24), (128, 24))


@dataclass(frozen=True)
class Variant:
    """A router of the ablations.

    folder: below the folder of routers. about: how its training differs from that of `plain`. options: of the stage
    that it was trained with, `None` for a key that was left out. recipe: options of the training.
    """

    folder: str
    about: str
    options: Mapping[str, Any]
    recipe: Mapping[str, Any]


VARIANTS = (
    Variant("plain", "seed 0", {}, {}),
    Variant("plain-1", "seed 1", {"seed": 1}, {"seed": 1}),
    Variant("no-noise", "candidates drawn without noise", {}, {}),
    Variant("tokens-only", "trained to choose tokens only", {"keep_layers": None}, {}),
    Variant("layers-only", "trained to choose layers only", {"keep": None}, {}),
    Variant("depth-2", "two blocks", {"depth": 2}, {}),
    Variant("causal", "causal attention", {"attention": "causal"}, {}),
    Variant("dpo", "DPO's loss", {}, {"loss": "dpo"}),
)
