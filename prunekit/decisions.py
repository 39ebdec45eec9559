"""What strategies ask for and what they decide: plain frozen data, no live modules.

Shape letters: B batch, S sequence, V visual tokens, H hidden, A heads, N layers, O output slots.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Which attention rows the input `attention` holds: softmax rows over all keys, cut to the visual columns.

    layer: `previous` is the layer that ran just before the site.
    queries: `last` is the last prompt token of each sample.
    heads: how the A heads become one number: `mean` or `max`.
    """

    layer: Literal["previous"] = "previous"
    queries: Literal["last"] = "last"
    heads: Literal["mean", "max"] = "mean"

    def __post_init__(self) -> None:
        """Raises ValueError for rows that this version does not compute, rather than giving others."""
        if self.layer != "previous" or self.queries != "last" or self.heads not in ("mean", "max"):
            raise ValueError(f"{self} is not available: layer 'previous', queries 'last', heads 'mean' or 'max'")


@dataclass(frozen=True)
class Selection:
    """Which visual tokens leave a stage, for the whole batch.

    keep: bool (B, V), the anchors: a kept token keeps its slot and its position.
    weights: None when every slot simply is its anchor. Else float (B, V, V): row `i` of a kept token says how the
        V tokens that entered are summed into its slot; rows of dropped tokens are ignored.
    """

    keep: Tensor
    weights: Tensor | None = None


class LayerAction(Enum):
    """What becomes of one decoder layer, in prefill and in decoding alike."""

    RUN = "run"
    SKIP = "skip"  # the identity; the layer writes no KV
    SKIP_ATTENTION = "skip_attention"  # MLP only; the layer writes no KV
    SKIP_MLP = "skip_mlp"  # attention only


@dataclass(frozen=True)
class LayerPlan:
    """An action for each decoder layer that does not simply run; layers that are not named run."""

    actions: Mapping[int, LayerAction] = field(default_factory=dict)

    def __getitem__(self, layer: int) -> LayerAction:
        return self.actions.get(layer, LayerAction.RUN)

    def __iter__(self) -> Iterator[tuple[int, LayerAction]]:
        return iter(sorted(self.actions.items()))

    def merge(self, other: LayerPlan) -> LayerPlan:
        """Both plans together. Raises ValueError when they disagree about a layer."""
        for layer, action in other:
            if layer in self.actions and self.actions[layer] is not action:
                raise ValueError(f"layer {layer}: one stage says {self.actions[layer].value}, another {action.value}")
        return LayerPlan({**self.actions, **other.actions})


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a model that pipelines are checked and costed against.

    visual_tokens: per image, or None where it depends on the picture.
    attention_params, mlp_params: weights of the matrix products of one decoder layer's attention and MLP.
    kv_width: numbers that one token adds to the KV cache of one layer (keys and values together).
    """

    family: str
    layers: int
    hidden: int
    heads: int
    head_dim: int
    attention_params: int
    mlp_params: int
    kv_width: int
    visual_tokens: int | None
