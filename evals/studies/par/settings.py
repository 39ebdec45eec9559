"""What the study compares: settings, strategies, routers. Nothing is measured here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "docs" / "par.md"
RESULTS = ROOT / "docs" / "par-study.json"
PIPELINE = ROOT / "strategies" / "pipelines" / "par.yaml"
COMMAND = "python -m prunekit_evals.studies.par"
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
SETTINGS = ((0.6, 0), (0.5, 0), (0.5, 1), (0.4, 0))
# Of these the ones at which ablations are compared: without and with skipped layers at equal FLOPs.
COMPARED = (1, 2)


def settings_for(layers: int) -> tuple[Setting, ...]:
    """The settings of the study on a model of so many layers."""
    return tuple(Setting(flops, layers - skipped) for flops, skipped in SETTINGS)


# T and L of the paper's table, of 576 tokens and 32 layers.
PAPER = ((256, 28), (176, 28), (144, 24), (128, 24))


@dataclass(frozen=True)
class Variant:
    """A router of the ablations. folder: below the folder of routers. about: how its training differs from `plain`."""

    folder: str
    about: str


# `train` trains what is missing of these.
VARIANTS = (
    Variant("plain", "tokens and layers, seed 0"),
    Variant("plain-1", "seed 1"),
    Variant("no-noise", "candidates drawn without noise on attention"),
    Variant("tokens-only", "trained to choose tokens only"),
    Variant("layers-only", "trained to choose layers only; all tokens stay"),
    Variant("depth-2", "two blocks"),
    Variant("causal", "causal attention"),
    Variant("dpo", "DPO's loss"),
)
