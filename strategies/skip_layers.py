"""Static layer skipping: the layers that a list names, for every sample (as in ShortGPT, https://arxiv.org/abs/2403.03853)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from prunekit import LayerAction, LayerPlan, ModelShape, hookimpl

ACTIONS = {"layer": LayerAction.SKIP, "attention": LayerAction.SKIP_ATTENTION, "mlp": LayerAction.SKIP_MLP}


@dataclass(frozen=True)
class SkipLayers:
    """Leave out decoder layers, in prefill and decoding.

    layers: their numbers, from 0. what: the whole layer, or only its attention or its MLP.
    """

    layers: tuple[int, ...]
    what: Literal["layer", "attention", "mlp"] = "layer"

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
        return LayerPlan(dict.fromkeys(self.layers, ACTIONS[self.what]))
