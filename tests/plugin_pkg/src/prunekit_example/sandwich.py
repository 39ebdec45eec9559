"""Baseline: leave out every second of the layers in the middle."""

from prunekit import LayerAction, LayerPlan, ModelShape, hookimpl, strategy


@strategy()
class Sandwich:
    """The first and the last quarter of the layers run."""

    @hookimpl
    def plan_layers(self, shape: ModelShape) -> LayerPlan:
        """The same plan for every sample."""
        quarter = shape.layers // 4
        return LayerPlan(dict.fromkeys(range(quarter + 1, shape.layers - quarter, 2), LayerAction.SKIP))
