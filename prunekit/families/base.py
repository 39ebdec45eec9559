"""What a family file says about its models: where the parts are, and what is special."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunekit.decisions import ModelShape
from prunekit.errors import Unsupported


@dataclass(frozen=True)
class Parts:
    """The live modules of one model, as the engine needs them.

    base: receives `input_ids` and holds `get_image_features`. text: the decoder stack whose output is
    `last_hidden_state`. attention, mlp: attribute names on each of `layers`. visual_ids: token ids whose places in
    the prompt are filled with image features. coords: from the number n of visual tokens of one image to int64 (n, 2),
    row and column of each.
    """

    family: str
    base: nn.Module
    text: nn.Module
    layers: Sequence[nn.Module]
    visual_ids: tuple[int, ...]
    coords: Callable[[int], Tensor]
    visual_tokens: int | None = None
    attention: str = "self_attn"
    mlp: str = "mlp"

    @property
    def attention_implementation(self) -> str:
        """How the decoder attends: `sdpa`, `eager` ..."""
        config: Any = self.text.config
        return str(config._attn_implementation)

    def shape(self) -> ModelShape:
        """The numbers of the model; it may live on the meta device."""
        config: Any = self.text.config
        layer = self.layers[0]
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        return ModelShape(
            family=self.family,
            layers=len(self.layers),
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            head_dim=head_dim,
            attention_params=_matrix_params(getattr(layer, self.attention)),
            mlp_params=_matrix_params(getattr(layer, self.mlp)),
            kv_width=2 * kv_heads * head_dim,
            visual_tokens=self.visual_tokens,
        )


@dataclass(frozen=True)
class Family:
    """One LVLM family: the `model_type` values of its configs, and how to find the parts of a model."""

    name: str
    model_types: frozenset[str]
    parts: Callable[[PreTrainedModel], Parts]


def square_grid(tokens: int) -> Tensor:
    """Row and column, int64 (tokens, 2), of visual tokens that fill a square picture row by row.

    Raises Unsupported if `tokens` is no square number, as when a CLS token is among them.
    """
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise Unsupported(
            f"{tokens} visual tokens do not fill a square grid, so a strategy that asks for `coords` cannot run on them"
        )
    return torch.cartesian_prod(torch.arange(side), torch.arange(side)).view(-1, 2)


def _matrix_params(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.ndim == 2)
