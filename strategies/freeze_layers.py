"""Static freezing: visual tokens pass unchanged through the layers that a list names (https://arxiv.org/abs/2504.00502).

There they are no queries and skip the MLP; the other tokens attend to them as before. `shortv` finds the list by
ShortV's ranking; that paper's own, of LLaVA-1.5-7B, is 31, 29, 30, 28, 0, 26, 27, 25, 24, 22, 23, 21, 2, 3, 20, 18, 17,
12, 19 (icip-cas/ShortV@737c28c).
"""

from __future__ import annotations

from prunekit import LayerAction, LayerPlan, ModelShape, hookimpl, strategy


@strategy(paper="2504.00502", code="icip-cas/ShortV@737c28c")
class FreezeLayers:
    """Let visual tokens pass decoder layers unchanged at prefill. layers: their numbers, from 0."""

    layers: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("layers: name at least one layer")
        if min(self.layers) < 0 or len(set(self.layers)) != len(self.layers):
            raise ValueError("layers: layer numbers are counted from 0 and named once")

    @hookimpl
    def plan_layers(self, shape: ModelShape) -> LayerPlan:
        """The same plan for every sample."""
        beyond = [layer for layer in self.layers if layer >= shape.layers]
        if beyond:
            raise ValueError(f"layers: the model has layers 0 to {shape.layers - 1}, not {beyond}")
        return LayerPlan(dict.fromkeys(self.layers, LayerAction.FREEZE))
