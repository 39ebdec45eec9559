"""Ragged KV of fixed size, for `StaticCache` and compiled decoding.

A prefill runs as on a growing cache. When it is over, each layer's keys and values move into buffers as long as what
the layer kept plus the room that the cache has after the prompt, and decoding writes into them in place. Nothing on the
way of a compiled decoding step reads a context variable: what it needs stands on the cache's layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, StaticCache, StaticLayer

from prunekit.engine.cache.ragged import RaggedLayer
from prunekit.engine.tokens import masks
from prunekit.engine.tokens.layout import Layout
from prunekit.errors import Unsupported
from prunekit.strategy.decisions import LayerAction
from prunekit.upstream import CACHE, EMPTY_LAYERS


class RaggedStaticLayer(RaggedLayer):  # type: ignore[no-untyped-call]
    """The KV of one decoder layer in buffers of fixed size, once the prefill is over.

    max_cache_len: logical tokens that fit, prompt and decoded ones. passed: int64 (), those that have passed; a tensor,
    so that compiled steps need not be traced again.
    """

    is_compileable = True

    def __init__(self, max_cache_len: int) -> None:
        super().__init__()
        self.max_cache_len = max_cache_len
        self.passed: Tensor | None = None
        # Rows of the batch; older transformers asks for it before it takes the cache again.
        self.max_batch_size = 0
        # Where the buffers of a layer that kept K of S prompt tokens write the logical token t: at t + K - S.
        self.offset = 0

    @property
    def sealed(self) -> bool:
        """Whether the prefill is over and the buffers exist."""
        return self.passed is not None

    def begin(self, layout: Layout | None, actions: Sequence[LayerAction]) -> None:
        if len(set(actions)) > 1:
            raise Unsupported(
                "on a static cache all samples of a batch must run the same layers; leave out `cache_implementation`, "
                "or give the samples one by one"
            )
        self.max_batch_size = len(actions)
        super().begin(layout, actions)

    def seal(self) -> None:
        """Move what the prefill wrote into buffers that decoding can write into."""
        length = self.logical
        device = None if self.keys is None else self.keys.device
        self.passed = torch.tensor(length, device=device)
        if self.keys is not None and self.values is not None and self.rows is None:
            self.offset = self.keys.shape[2] - length
            self.keys, self.values = (self._buffer(states) for states in (self.keys, self.values))
            for fixed in (self.keys, self.values, self.passed):
                torch._dynamo.mark_static_address(fixed)

    def _buffer(self, states: Tensor) -> Tensor:
        batch, heads, width, dim = states.shape
        buffer = states.new_zeros(batch, heads, self.max_cache_len + self.offset, dim)
        buffer[:, :, :width] = states
        return buffer

    def open(self, tokens: int) -> None:
        if self.passed is None:
            super().open(tokens)
            return
        self.passed.add_(tokens)
        if not torch.compiler.is_compiling():  # a flag that changes would have every step traced again
            self._opened = True

    @property
    def tail(self) -> int:
        """Slots after the prompt, written or not; the mask closes those that are not."""
        if not self.sealed:
            return super().tail
        return 0 if self.layout is None else self.max_cache_len - self.layout.length

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As `RaggedLayer.update`; when sealed, writes in place and returns the buffers."""
        if not torch.compiler.is_compiling():
            if self.passed is None or not self._opened or self.rows == ():
                return super().update(key_states, value_states)
            self._opened = False
        assert self.passed is not None and self.keys is not None and self.values is not None
        count = key_states.shape[2]
        slots = torch.arange(count, device=self.keys.device) + (self.passed - count + self.offset)
        self.keys.index_copy_(2, slots, key_states)
        self.values.index_copy_(2, slots, value_states)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.logical if self.passed is None else self.passed  # type: ignore[return-value]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.max_cache_len, 0

    def get_max_length(self) -> int:
        """Logical tokens that fit."""
        return self.max_cache_len

    get_max_cache_shape = get_max_length  # its name before transformers 5.20

    def crop(self, count: int) -> None:
        raise Unsupported("a static KV cache cannot be cropped; use the default cache")

    def reset(self) -> None:
        super().reset()
        self.passed, self.offset, self.keys, self.values, self.is_initialized = None, 0, None, None, False


def takes(cache: Cache) -> bool:
    """Whether `cache` is a StaticCache whose layers attend to everything."""
    return type(cache) is StaticCache and all(
        type(layer) in (StaticLayer, RaggedStaticLayer, *EMPTY_LAYERS) for layer in cache.layers
    )


def layers_for(cache: Cache, tokens: int) -> list[RaggedLayer]:
    """Ragged layers of fixed size in place of a StaticCache's own. Raises Unsupported for longer prompts."""
    size = min(layer.max_cache_len for layer in cache.layers if not isinstance(layer, EMPTY_LAYERS))  # type: ignore[union-attr]
    if tokens > size:
        raise Unsupported(f"a prompt of {tokens} tokens does not fit into a static cache of {size}")
    return [RaggedStaticLayer(size) for _ in cache.layers]


def seal(cache: Cache | None) -> None:
    """Fix the sizes of a cache's layers after a prefill, if it is static."""
    for layer in () if cache is None else cache.layers:
        if isinstance(layer, RaggedStaticLayer):
            layer.seal()


def forget(model: Any) -> None:
    """Leave no ragged cache behind: transformers before 5.18 keeps the static cache of `generate` on the model."""
    kept = model.__dict__.get("_cache")
    if kept is not None and any(isinstance(layer, RaggedStaticLayer) for layer in getattr(kept, "layers", ())):
        del model.__dict__["_cache"]


def is_sealed(cache: Any) -> bool:
    """Whether `cache` is static, and was filled under a pipeline: all that decoding needs stands on it."""
    return cache is not None and all(isinstance(one, RaggedStaticLayer) and one.sealed for one in cache.layers)


def decode(
    number: int, original: Callable[..., Any], hidden: Tensor, kwargs: Mapping[str, Any], kind: masks.Kind
) -> Any:
    """Layer `number` in a compiled decoding step: what `Decoding.run_layer` does, from the cache alone."""
    store: RaggedStaticLayer = kwargs[CACHE].layers[number]
    tokens, action, layout = hidden.shape[-2], store.actions, store.layout
    if action is LayerAction.SKIP:
        store.open(tokens)
        return hidden
    if action not in (LayerAction.RUN, LayerAction.FREEZE) or (layout is not None and layout.shift is not None):
        what = "renumbered positions" if action is LayerAction.RUN else f"layers that '{action}' in decoding"
        raise Unsupported(f"{what} cannot be compiled; decode uncompiled")
    store.open(tokens)
    if layout is None:
        return original(hidden, **kwargs)
    mask = kwargs.get("attention_mask")
    if mask is None:
        raise Unsupported("compiled decoding on a pruned cache needs the attention mask that `generate` makes")
    local = masks.decode_mask(mask, layout, store.tail, tokens, hidden, kind)
    return original(hidden, **{**kwargs, "attention_mask": local})
