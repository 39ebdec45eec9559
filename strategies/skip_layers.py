"""Static layer skipping: the layers that a list names, for every sample (as in ShortGPT, https://arxiv.org/abs/2403.03853)."""

from __future__ import annotations

from typing import Literal

from prunekit import LayerAction, LayerPlan, ModelShape, hookimpl, strategy

ACTIONS = {"layer": LayerAction.SKIP, "attention": LayerAction.SKIP_ATTENTION, "mlp": LayerAction.SKIP_MLP}


@strategy(paper="2403.03853")
class SkipLayers:
    """Leave out decoder layers.

    layers: their numbers, from 0. what: the whole layer, or only its attention or its MLP. phase: in which phase.
    fill_kv: whole layers still write the keys and values of their input, for the phase that runs them.
    """

    layers: tuple[int, ...]
    what: Literal["layer", "attention", "mlp"] = "layer"
    phase: Literal["both", "prefill", "decode"] = "both"
    fill_kv: bool = False

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("layers: name at least one layer")
        if min(self.layers) < 0 or len(set(self.layers)) != len(self.layers):
            raise ValueError("layers: layer numbers are counted from 0 and named once")
        if self.fill_kv and (self.what != "layer" or self.phase == "both"):
            raise ValueError("fill_kv: is for whole layers (`what: layer`) that one `phase` alone leaves out")

    @hookimpl
    def plan_layers(self, shape: ModelShape) -> LayerPlan:
        """The same plan for every sample."""
        beyond = [layer for layer in self.layers if layer >= shape.layers]
        if beyond:
            raise ValueError(f"layers: the model has layers 0 to {shape.layers - 1}, not {beyond}")
        plan = dict.fromkeys(self.layers, LayerAction.FILL_KV if self.fill_kv else ACTIONS[self.what])
        if self.phase == "both":
            return LayerPlan(plan)
        return LayerPlan(plan, {}) if self.phase == "prefill" else LayerPlan({}, plan)
