"""What a family file says about its models: where the parts are, and what is special."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunekit.errors import Unsupported
from prunekit.families.images import Images
from prunekit.strategy.decisions import ModelShape, TowerParams, TowerShape


@dataclass(frozen=True)
class Modality:
    """One kind of visual input that a family takes, `image` or `video`.

    method: the method of the base model that encodes it, such as `get_image_features`; the `pooler_output` of what it
        returns holds one entry for each image or video, in the order of the prompt.
    pixels: the argument of that method with the pixels.
    token_ids: ids whose embeddings in the prompt are replaced by its features.
    coords: from the method's arguments by name and the number of visual tokens of each image or video to int64 (n, 5)
        for each: crop or frame, row, column, and the rows and columns of that crop or frame; row and column are -1 on
        tokens that only separate, such as the newlines of any-resolution models. Raises Unsupported where there is no
        grid. Called only when a strategy asks for `coords` or `frames`.
    """

    name: str
    method: str
    pixels: str
    token_ids: tuple[int, ...]
    coords: Callable[[Mapping[str, Any], Sequence[int]], list[Tensor]]


@dataclass(frozen=True)
class Tower:
    """The vision tower, where a family's tower can be cut and read. Families whose towers cannot leave it out.

    layers: its blocks, each called with hidden states (rows, tokens, width); a row is one crop or frame. attention,
    mlp: names of the two parts of a block, each added to the residual. leading: tokens in front of the patches, such as
    CLS. feature_layer: which hidden state the projector gets, counted as in `output_hidden_states` (-1 the last; of
    several, the latest). projector: from tower features to the decoder's width, token by token; None where it mixes or
    pools them. Behind a cut it runs on what visual tokens still need, if it gets the tower's rows with all tokens or
    without the first; what it gets in other numbers, such as pooled frames, it maps in full. pool: the head behind the
    blocks that attends from one learned query, where there is one.
    patch_groups: from the name of the modality, the method's arguments, the rows of the tower's batch and the patches
    of a row (without `leading`) to int64 (V, p) for each image or video: the patches, numbered through all rows, that
    become each of its visual tokens; -1 for one without a patch, such as a newline. Raises Unsupported where visual
    tokens are not made of whole patches. None: a row is an image, and a patch a visual token.
    packed: blocks get all images or videos as one sequence, (tokens, width) or (1, tokens, width), with their rotations
    and borders, or a mask.
    embedding: makes the state of each patch from its pixels, by one matrix product. mergers: make visual tokens of the
    blocks' output, module by module from what becomes one token; in a packed tower each gets (tokens, ...), the patches
    of a visual token together, or (visual tokens, ...), in the order of the tokens that enter the blocks, and its
    output is (visual tokens, ...). Without an embedding the cost of the tower is not known.
    images: how the method's arguments hold images; None where that is not known. parts: from the name of the modality,
    the method's arguments and the number of a block to int64 (V,) for each image or video: the part of it, such as a
    frame or a window, within which the patches of each visual token attend in that block of a packed tower; None: each
    image is one part. tokens: T where all images have one size; None where the tower is packed.
    """

    layers: Sequence[nn.Module]
    projector: nn.Module | None
    attention: str = "self_attn"
    mlp: str = "mlp"
    leading: int = 0
    feature_layer: int = -1
    patch_groups: Callable[[str, Mapping[str, Any], int, int], list[Tensor]] | None = None
    pool: nn.Module | None = None
    packed: bool = False
    embedding: nn.Module | None = None
    mergers: tuple[nn.Module, ...] = ()
    images: Images | None = None
    parts: Callable[[str, Mapping[str, Any], int], list[Tensor]] | None = None
    tokens: int | None = None

    @property
    def feature_block(self) -> int:
        """The block whose output the projector gets; -1: none has run."""
        return self.feature_layer % (len(self.layers) + 1) - 1

    def shape(self) -> TowerShape:
        """The numbers of the tower; it may live on the meta device."""
        config: Any = getattr(getattr(self.layers[0], self.attention), "config", None)
        return TowerShape(
            blocks=len(self.layers),
            feature_block=self.feature_block,
            leading=self.leading,
            pool=self.pool is not None,
            projects_tokens=self.projector is not None,
            attention=str(getattr(config, "_attn_implementation", "eager")),
            images="" if self.images is None else "whole" if self.images.cell is None else "any",
            work=self._params(),
        )

    def _params(self) -> TowerParams | None:
        if self.embedding is None:
            return None
        block = self.layers[0]
        attention: Any = getattr(block, self.attention)
        width = getattr(attention, "num_heads", 0) * getattr(attention, "head_dim", 0)
        if not width:
            return None
        return TowerParams(
            patch=_weights(self.embedding),
            attention=_weights(attention),
            mlp=_weights(getattr(block, self.mlp)),
            width=width,
            projector=0 if self.projector is None else _weights(self.projector),
            mergers=tuple(map(_weights, self.mergers)),
            pool=0 if self.pool is None else _weights(self.pool),
            tokens=self.tokens,
        )


@dataclass(frozen=True)
class Parts:
    """The live modules of one model, as the engine needs them.

    base: receives `input_ids` and encodes images and videos. text: the decoder stack, whose output is
        `last_hidden_state`. layers: its decoder layers. modalities: the kinds of visual input that it takes.
    visual_tokens: of one image, None where that depends on the image.
    attention, mlp: names of the two parts of a layer; mlp_norm: of the norm before the MLP, whose input is the state
        after attention; None where attention and MLP run side by side.
    mlp_params: weights of the MLP's matrix products that one token passes, on average over the layers; None: those of
        layer 0.
    norm: of the module of `text` that its output passes last.
    rotary: the module of `text` that makes `position_embeddings`, None where there is none.
    logical_until: the first layer after which the decoder loop no longer touches hidden states between layers (it adds
        features to them in Qwen3-VL); 0: it never does.
    token_kwargs: further arguments of a layer with one entry per token, (B, S, ...), to be cut along with them.
    tower: None where the vision tower cannot be cut or read.
    """

    family: str
    base: nn.Module
    text: nn.Module
    layers: Sequence[nn.Module]
    modalities: tuple[Modality, ...]
    visual_tokens: int | None = None
    attention: str = "self_attn"
    mlp: str = "mlp"
    mlp_norm: str | None = "post_attention_layernorm"
    mlp_params: int | None = None
    norm: str = "norm"
    rotary: str | None = "rotary_emb"
    logical_until: int = 0
    token_kwargs: tuple[str, ...] = ()
    tower: Tower | None = None

    @property
    def visual_ids(self) -> tuple[int, ...]:
        """Token ids whose embeddings are replaced by features of any kind of visual input."""
        return tuple(token for modality in self.modalities for token in modality.token_ids)

    @property
    def final_norm(self) -> nn.Module:
        """What the decoder's output passes last. Raises Unsupported where there is no such module."""
        norm = getattr(self.text, self.norm, None)
        if not isinstance(norm, nn.Module):
            raise Unsupported(f"the {self.family} decoder has no final norm '{self.norm}', for which a hook asks")
        return norm

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
        attention = matrix_params(getattr(layer, self.attention))
        inner = config.num_attention_heads * head_dim
        return ModelShape(
            family=self.family,
            layers=len(self.layers),
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            head_dim=head_dim,
            attention_params=attention,
            mlp_params=matrix_params(getattr(layer, self.mlp)) if self.mlp_params is None else self.mlp_params,
            kv_width=2 * kv_heads * head_dim,
            visual_tokens=self.visual_tokens,
            tower=None if self.tower is None else self.tower.shape(),
            attention=self.attention_implementation,
            cuts_inside=self.mlp_norm is not None,
            logical_until=self.logical_until,
            layer_kinds=tuple(getattr(config, "layer_types", None) or ()),
            rotary=self.rotary is not None,
            output_params=attention - config.hidden_size * (inner + 2 * kv_heads * head_dim),
        )


@dataclass(frozen=True)
class Family:
    """One LVLM family: the `model_type` values of its configs, and how to find the parts of a model."""

    name: str
    model_types: frozenset[str]
    parts: Callable[[PreTrainedModel], Parts]


def square_grid(tokens: int) -> Tensor:
    """Row and column, int64 (tokens, 2), of visual tokens that fill a square image row by row.

    Raises Unsupported if `tokens` is no square number, as when a CLS token is among them.
    """
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise Unsupported(
            f"{tokens} visual tokens do not fill a square grid, so a strategy that asks for `coords` cannot run on them"
        )
    return torch.cartesian_prod(torch.arange(side), torch.arange(side)).view(-1, 2)


def square_coords(arguments: Mapping[str, Any], counts: Sequence[int]) -> list[Tensor]:
    """Coords of images that each fill one square grid; as `Modality.coords`."""
    return [grid_coords(square_grid(count)) for count in counts]


def grid_coords(grid: Tensor, crop: int = 0) -> Tensor:
    """Coords, int64 (n, 5), of one complete grid from rows and columns, int64 (n, 2)."""
    size = grid.amax(0) + 1
    return torch.cat([grid.new_full((len(grid), 1), crop), grid, size.expand(len(grid), 2)], dim=1)


def _weights(module: nn.Module) -> int:
    """Weights of matrix products, those of convolutions among them; a learned query or a norm is none.

    Of a linear layer by its sizes, since quantised ones pack their weights.
    """
    total = 0
    for part in module.modules():
        linear: Any = part
        if isinstance(getattr(part, "in_features", None), int):
            total += linear.in_features * linear.out_features
        else:
            shapes = [parameter.shape for parameter in part.parameters(recurse=False)]
            total += sum(shape.numel() for shape in shapes if len(shape) >= 2 and shape[0] > 1)
    return total


def matrix_params(module: nn.Module) -> int:
    """Weights of the matrix products that every token passes."""
    return sum(p.numel() for p in module.parameters() if p.ndim == 2)
