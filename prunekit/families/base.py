"""What a family file says about its models: where the parts are, and what is special."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from prunekit.errors import Unsupported
from prunekit.families.features import Features, each
from prunekit.families.tower_parts import Tower
from prunekit.families.weights import head_sizes, matrix_params, mixer_params
from prunekit.strategy.decisions import LayerShape, ModelShape


@dataclass(frozen=True)
class Modality:
    """One kind of visual input that a family takes, `image` or `video`.

    method: the method of the base model that encodes it, such as `get_image_features`.
    pixels: the argument with the pixels, of the model's call and of that method (`upstream.Encoder` where they differ).
    token_ids: ids whose embeddings in the prompt are replaced by its features.
    coords: from the method's arguments by name and the number of visual tokens of each image or video to int64 (n, 5)
        for each: crop or frame, row, column, and the rows and columns of that crop or frame; row and column are -1 on
        tokens that only separate, such as the newlines of any-resolution models. Where the crops of an image stand side
        by side, (n, 9): then follow row, column, rows and columns in the grid that they form together. Raises
        Unsupported where there is no grid. Called only when a strategy asks for `coords`, `frames` or `places`.
    features: from the method's arguments by name, empty where they are not known, and the `pooler_output` of what it
        returns to float (tokens, H) for each image or video, in the order of the prompt.
    """

    name: str
    method: str
    pixels: str
    token_ids: tuple[int, ...]
    coords: Callable[[Mapping[str, Any], Sequence[int]], list[Tensor]]
    features: Features = each


@dataclass(frozen=True)
class Parts:
    """The live modules of one model, as the engine needs them.

    base: receives `input_ids` and encodes images and videos. text: the decoder stack, whose output is
        `last_hidden_state`. layers: its decoder layers. modalities: the kinds of visual input that it takes.
    visual_tokens: of one image, None where that depends on the image.
    attention, mlp: names of the two parts of a layer; mlp_norm: of the norm before the MLP, or the MLP where there is
        none, whose input is the state after attention; None where no part has that: attention and MLP run side by side.
    mixer: the name of the part that stands in the place of attention in layers that hold a recurrent state instead of
        keys and values of tokens; None where all layers attend.
    mlp_params: weights of the MLP's matrix products that one token passes, on average over the layers; None: those of
        layer 0. layer_mlps: of each layer, where they differ, as where the first layers have no experts; else empty.
    norm: of the module of `text` that its output passes last.
    rotary: the module of `text` that makes `position_embeddings`, None where there is none.
    reads_positions: layers use the position ids that they are given, and not only to tell packed sequences apart.
    counts_to: layers count positions by themselves, in the tokens that they get, which matters from this one on; None:
        they do not.
    logical_until: the first layer after which the decoder loop no longer touches hidden states between layers (it adds
        features to them in Qwen3-VL); 0: it never does.
    opaque: why nothing can be cut inside the decoder, so that tokens leave at its input only; None: all can be.
    own_inputs: layers get inputs of their own for each token, beside hidden states.
    kv_sources: for each layer the one whose keys and values it attends to, itself or an earlier one, which hands them
        on in the layer's argument `upstream.SHARED_KV`; empty: itself.
    stream: the number of the hidden states' main stream where layers get several side by side, (streams, B, S, H);
        None: they get one.
    mlp_last: a layer does nothing with what its MLP gives but add it to the state.
    other_params, early_params: multiplications for one token in a layer's parts beside attention and MLP, and those of
        them in front of attention.
    tower: None where the vision tower cannot be cut or read.
    """

    family: str
    base: nn.Module
    text: nn.Module
    layers: Sequence[nn.Module]
    modalities: tuple[Modality, ...]
    visual_tokens: int | None = None
    attention: str = "self_attn"
    mixer: str | None = None
    mlp: str = "mlp"
    mlp_norm: str | None = "post_attention_layernorm"
    mlp_params: int | None = None
    layer_mlps: tuple[int, ...] = ()
    norm: str = "norm"
    rotary: str | None = "rotary_emb"
    reads_positions: bool = False
    counts_to: int | None = None
    logical_until: int = 0
    opaque: str | None = None
    own_inputs: bool = False
    kv_sources: tuple[int, ...] = ()
    stream: int | None = None
    mlp_last: bool = True
    other_params: int = 0
    early_params: int = 0
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

    def attends(self, number: int) -> bool:
        """Whether decoder layer `number` attends, and so has keys and values of its tokens."""
        return self.mixer is None or hasattr(self.layers[number], self.attention)

    def mixing(self, number: int) -> nn.Module:
        """The attention of decoder layer `number`, or what stands in its place."""
        name = self.attention if self.mixer is None or self.attends(number) else self.mixer
        module: nn.Module = getattr(self.layers[number], name)
        return module

    @property
    def attention_implementation(self) -> str:
        """How the decoder attends: `sdpa`, `eager` ..."""
        config: Any = self.text.config
        return str(config._attn_implementation)

    def is_reader(self, layer: int) -> bool:
        """Whether a layer attends to keys and values of an earlier one."""
        return bool(self.kv_sources) and self.kv_sources[layer] != layer

    def is_source(self, layer: int) -> bool:
        """Whether a later layer attends to the keys and values of this one."""
        return layer in self.kv_sources[layer + 1 :]

    def shape(self) -> ModelShape:
        """The numbers of the model; it may live on the meta device."""
        config: Any = self.text.config
        if self.opaque is not None:
            return self._opaque_shape()
        recurrent = tuple(number for number in range(len(self.layers)) if not self.attends(number))
        attentions = {number: self.mixing(number) for number in range(len(self.layers)) if self.attends(number)}
        heads, first = head_sizes(config, attentions), self.layers[min(attentions)]
        return ModelShape(
            family=self.family,
            layers=len(self.layers),
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            head_dim=(heads.key + heads.value) // 2,
            attention_params=sum(map(matrix_params, attentions.values())) // len(attentions),
            mlp_params=matrix_params(getattr(first, self.mlp)) if self.mlp_params is None else self.mlp_params,
            kv_width=heads.kv_width,
            visual_tokens=self.visual_tokens,
            tower=None if self.tower is None else self.tower.shape(),
            attention=self.attention_implementation,
            cuts_inside=self.mlp_norm is not None,
            logical_until=self.logical_until,
            layer_kinds=tuple(getattr(config, "layer_types", None) or ()),
            rotary=self.rotary is not None,
            output_params=config.hidden_size * config.num_attention_heads * heads.value,
            per_layer=tuple(map(self._layer_shape, range(len(self.layers)))) if self._layers_differ else (),
            kv_sources=self.kv_sources,
            last_only=self._last_only,
            window=_window(config),
            recurrent=recurrent,
            mixer_params=mixer_params(self.mixing(recurrent[0])) if recurrent else 0,
        )

    def _opaque_shape(self) -> ModelShape:
        """Of a decoder that is not known inside: its weights, spread evenly, and what its config says of attention."""
        config: Any = self.text.config
        heads = getattr(config, "num_attention_heads", None) or 1
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        return ModelShape(
            family=self.family,
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            heads=heads,
            head_dim=head_dim,
            attention_params=0,
            mlp_params=self.mlp_params or 0,
            kv_width=2 * (getattr(config, "num_key_value_heads", None) or heads) * head_dim,
            visual_tokens=self.visual_tokens,
            tower=None if self.tower is None else self.tower.shape(),
            attention=self.attention_implementation,
            cuts_inside=False,
            rotary=False,
            layer_kinds=tuple(getattr(config, "layer_types", None) or ()),
            opaque=self.opaque or "",
            window=_window(config),
        )

    @property
    def _layers_differ(self) -> bool:
        attending = [number for number in range(len(self.layers)) if self.attends(number)]
        widths = {getattr(self.mixing(number), "head_dim", None) for number in attending}
        return bool(self.kv_sources or self.other_params or self.layer_mlps or len(widths) > 1)

    def _layer_shape(self, number: int) -> LayerShape:
        """The numbers of one layer, from its own modules."""
        attention: Any = self.mixing(number)
        config: Any = self.text.config
        mlp = self.layer_mlps[number] if self.layer_mlps else matrix_params(getattr(self.layers[number], self.mlp))
        if not self.attends(number):
            params = mixer_params(attention)
            return LayerShape(0, 0, params, params, mlp, 0)
        heads = head_sizes(config, {number: attention})
        output = getattr(attention, "o_proj", None)
        return LayerShape(
            config.num_attention_heads,
            (heads.key + heads.value) // 2,
            attention_params=matrix_params(attention),
            output_params=config.hidden_size * config.num_attention_heads * heads.value
            if output is None
            else matrix_params(output),
            mlp_params=mlp,
            kv_width=heads.kv_width,
            other_params=self.other_params,
            early_params=self.early_params,
            reads_kv=self.is_reader(number),
        )

    @property
    def _last_only(self) -> int | None:
        """The first of the last layers that write no KV, where the decoder knows how many tokens are wanted of it."""
        if "logits_to_keep" not in inspect.signature(self.text.forward).parameters:
            return None
        writing = max((layer for layer in range(len(self.layers)) if not self.is_reader(layer)), default=-1)
        return writing + 1 if 0 <= writing < len(self.layers) - 1 else None


def _window(config: Any) -> int | None:
    """As `ModelShape.window`."""
    window: int | None = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
    return window


@dataclass(frozen=True)
class Family:
    """One LVLM family: the `model_type` values of its configs, and how to find the parts of a model."""

    name: str
    model_types: frozenset[str]
    parts: Callable[[PreTrainedModel], Parts]
