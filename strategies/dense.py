"""Baseline: the model as it is, every token and every layer."""

from __future__ import annotations

from dataclasses import dataclass

from prunekit import LayerPlan, hookimpl


@dataclass(frozen=True)
class Dense:
    """Prune nothing; the row that every other pipeline is compared with."""

    @hookimpl
    def plan_layers(self) -> LayerPlan:
        """Run every layer."""
        return LayerPlan()
