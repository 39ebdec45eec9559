"""What the stock model gives its decoder layers when it generates: masks and positions, noted while it does.

Families differ in who sees whom (windows, images that see themselves, prefixes) and in how positions count (one axis,
three). None of that is written down here: a `StockRun` records a stock `generate` with its cache, call by call, and
puts the pieces together into masks and positions of the whole sequence. They do not depend on what was decoded.

Shape letters: B batch, P padded prompt, S prompt plus decoded tokens, H hidden.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from prunekit.families.generic import decoder_of, token_of
from prunekit.strategy.decisions import RECURRENT
from prunekit.upstream import CACHE

# Attention implementations whose masks say for every query and key whether it is seen.
SQUARE = ("sdpa", "eager")
# The last words of their class names: LlamaAttention, Lfm2ShortConv, CohereMLP, MixtralSparseMoeBlock, DeepseekV3MoE.
ATTENTION = re.compile(r"(Attention|GatedDeltaNet|ShortConv)$")
MLP = re.compile(r"(MLP|MoeBlock|MoE|MoELayer|FeedForward)$", re.IGNORECASE)


@dataclass(frozen=True)
class Rotation:
    """One call of a rotary module: its arguments, of which the integers `ids` (..., B, tokens) are the positions."""

    module: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    ids: Tensor
    result: Any

    def again(self, ids: Tensor) -> Any:
        """The same call with other positions."""
        args = [ids if one is self.ids else one for one in self.args]
        kwargs = {key: ids if one is self.ids else one for key, one in self.kwargs.items()}
        return self.module.forward(*args, **kwargs)


@dataclass
class LayerInputs:
    """What one layer got over all calls. rotations: of each call; empty where the model rotates nothing."""

    masks: list[Tensor] = field(default_factory=list)
    rotations: list[Rotation] = field(default_factory=list)


@dataclass
class StockRun:
    """Masks and positions of a stock generation.

    prompt: int64 (B, P), the prompt that it was taken from. layers: one entry per decoder layer. length: the S tokens
    that it covers. position_ids: as the decoder was given them, int64 (..., B|1, S); None: it was not.
    """

    prompt: Tensor
    length: int
    layers: Sequence[LayerInputs]
    position_ids: Tensor | None = None

    def mask(self, layer: int) -> Tensor:
        """Who sees whom in one layer of the stock model: bool (B, S, S), queries by keys."""
        rows = self.prompt.shape[0]
        square = torch.zeros(rows, self.length, self.length, dtype=torch.bool, device=self.prompt.device)
        start = 0
        for seen in self.layers[layer].masks:
            square[:, start : start + seen.shape[-2], : seen.shape[-1]] = seen
            start += seen.shape[-2]
        return square

    def positions(self, layer: int) -> Tensor | None:
        """Positions as the rotary module gets them, int64 (axes, B, S); None where the layer gets no rotation."""
        calls = self.layers[layer].rotations
        if not calls:
            return None
        rows = self.prompt.shape[0]
        return torch.cat([one.ids.view(-1, *one.ids.shape[-2:]).expand(-1, rows, -1) for one in calls], dim=-1)

    def rotate(self, layer: int, positions: Tensor) -> Any:
        """What the stock rotary module makes of positions, int64 (axes, B, S), for one layer."""
        first = self.layers[layer].rotations[0]
        return first.again(positions if first.ids.ndim > 2 else positions[0])


@torch.no_grad()
def stock_run_of(model: PreTrainedModel, inputs: Mapping[str, Tensor], steps: int) -> StockRun:
    """Record `model` while it generates `steps` tokens, at least 1: prompt + steps - 1 tokens of each row.

    model: stock, in eval mode, with no pipeline applied. inputs: as for `generate`.
    Raises ValueError when the model does not give its layers masks of all queries and keys.
    """
    decoder = decoder_of(model)
    layers = [LayerInputs() for _ in decoder.layers]
    prompt = inputs["input_ids"]
    given: list[Tensor | None] = []
    with ExitStack() as stack, as_square(model):
        calls: list[Rotation] = []
        note = decoder.register_forward_pre_hook(
            lambda _, args, kwargs: given.append(kwargs.get("position_ids")), with_kwargs=True
        )
        stack.callback(note.remove)
        for name, module in decoder.named_children():
            if module is not decoder.layers and "rot" in name:
                stack.enter_context(_rotations(module, calls))
        stack.enter_context(_for_all_tokens(decoder))
        for number, layer in enumerate(decoder.layers):
            stack.enter_context(_arguments(layer, layers[number], prompt.shape[0], calls))
        cast("Any", model).generate(
            **inputs, **{CACHE: _whole_cache(model)}, do_sample=False, num_beams=1, max_new_tokens=steps,
            min_new_tokens=steps,
        )  # fmt: skip
    ids = [one for one in given if one is not None]
    position_ids = torch.cat(ids, dim=-1) if ids and len(ids) == len(given) else None
    return StockRun(prompt, prompt.shape[1] + steps - 1, layers, position_ids)


def _whole_cache(model: PreTrainedModel) -> DynamicCache:
    """A cache whose attention layers keep every token, as with windows they would not, so that masks are square."""
    cache: Any = DynamicCache(config=model.config)
    whole: Any = DynamicLayer
    cache.layers = [whole() if isinstance(one, DynamicLayer) else one for one in cache.layers]
    return cast("DynamicCache", cache)


def visual_mask(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Bool, like `input_ids`: positions that the model fills with features of images and videos."""
    ids = [token_of(model.config, kind) for kind in ("image", "video")]
    return torch.isin(input_ids, torch.tensor([one for one in ids if one is not None], device=input_ids.device))


def recurrent_layers(model: PreTrainedModel) -> frozenset[int]:
    """Decoder layers that hold a state in place of keys and values, as the config names their kinds."""
    config: Any = decoder_of(model).config
    return frozenset(n for n, kind in enumerate(getattr(config, "layer_types", None) or ()) if kind in RECURRENT)


def parts_of(layer: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Attention, or what stands in its place, and MLP of a decoder layer, by the names of their classes.

    Raises ValueError if that fails.
    """
    parts = []
    for words in (ATTENTION, MLP):
        named = [module for module in layer.children() if words.search(type(module).__name__)]
        if len(named) != 1:
            raise ValueError(f"{type(layer).__name__} has {len(named)} parts named {words.pattern}, not one")
        parts += named
    return parts[0], parts[1]


def arguments_of(layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of `layer` by their names, but for the first."""
    names = list(inspect.signature(layer.forward).parameters)
    return dict(zip(names[1 : len(args)], args[1:], strict=True)) | dict(kwargs)


def kv_sources(layers: Sequence[Any]) -> tuple[int, ...]:
    """For each layer the one whose keys and values it attends to: itself, or the one of its kind that stores them."""
    found: list[int] = []
    for number, layer in enumerate(layers):
        attention = parts_of(layer)[0]
        same = [n for n, one in enumerate(layers[:number]) if _stores(one, getattr(attention, "layer_type", None))]
        found.append(same[-1] if getattr(attention, "is_kv_shared_layer", False) else number)
    return tuple(found)


def _stores(layer: nn.Module, kind: str | None) -> bool:
    attention = parts_of(layer)[0]
    return bool(getattr(attention, "store_full_length_kv", False)) and getattr(attention, "layer_type", None) == kind


@contextmanager
def as_square(model: PreTrainedModel) -> Iterator[None]:
    """While open, a model with kernels that take other masks (flash) runs under sdpa."""
    owners = [module.config for module in model.modules() if hasattr(module, "config")]
    configs: dict[int, Any] = {id(one): one for one in owners}
    changed = [(one, one._attn_implementation) for one in configs.values() if one._attn_implementation not in SQUARE]
    try:
        for config, _ in changed:
            config._attn_implementation = "sdpa"
        yield
    finally:
        for config, implementation in changed:
            config._attn_implementation = implementation


@contextmanager
def _for_all_tokens(decoder: nn.Module) -> Iterator[None]:
    """While open, a decoder that is told how many tokens are wanted of it, and may leave out others, runs for all."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, kwargs | ({"logits_to_keep": 0} if "logits_to_keep" in kwargs else {})

    handle = decoder.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _rotations(module: nn.Module, calls: list[Rotation]) -> Iterator[None]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        for one in (*args, *kwargs.values()):
            if isinstance(one, Tensor) and not one.is_floating_point():
                calls.append(Rotation(module, args, kwargs, one, result))

    handle = module.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _arguments(layer: nn.Module, inputs: LayerInputs, rows: int, calls: list[Rotation]) -> Iterator[None]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kwargs = arguments_of(layer, args, kwargs)
        tokens = args[0].shape[-2]
        before = sum(mask.shape[-2] for mask in inputs.masks)
        mask = kwargs.get("attention_mask")
        if mask is None or mask.ndim != 2:  # a layer with a recurrent state gets the padding alone
            inputs.masks.append(_as_bool(mask, tokens, before + tokens).expand(rows, -1, -1))
        for one in calls:
            if _same(one.result, kwargs.get("position_embeddings")):
                inputs.rotations.append(one)

    handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _same(made: Any, given: Any) -> bool:
    """Whether a layer is given what a rotary module made, or views of all of it."""
    if made is given or not (isinstance(made, tuple) and isinstance(given, tuple)):
        return made is given
    return all(
        one.data_ptr() == two.data_ptr() and one.shape == two.shape for one, two in zip(made, given, strict=True)
    )


def _as_bool(mask: Tensor | None, queries: int, keys: int) -> Tensor:
    """A mask of any kind as bool (B or 1, queries, keys); None is the causal one, as in transformers."""
    if mask is None:
        return torch.ones(1, queries, keys, dtype=torch.bool).tril(keys - queries)
    if mask.ndim != 4 or mask.shape[-2:] != (queries, keys):
        raise ValueError(f"the mask of a layer is {tuple(mask.shape)}, not (batch, heads, {queries}, {keys})")
    return mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] > torch.finfo(mask.dtype).min / 2
