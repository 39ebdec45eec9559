"""Baseline: the model as it is, every token and every layer."""

from __future__ import annotations

from prunekit import LayerPlan, hookimpl, strategy


@strategy(group="baselines")
class Dense:
    """Prune nothing; the row that every other pipeline is compared with."""

    @hookimpl
    def plan_layers(self) -> LayerPlan:
        """Run every layer."""
        return LayerPlan()
