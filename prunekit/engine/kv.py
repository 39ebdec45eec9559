"""Ragged per-layer KV: physical keys and values of the kept tokens, answering transformers in logical lengths.

`generate()` sizes masks and positions from the cache. A layer that stored fewer tokens, or none, must still say how
long the
sequence is; so these layers count logical tokens beside the physical ones. All per-row state lives on them, and
therefore follows the cache through beam reordering, row selection and cropping.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from prunekit.engine.layout import Layout
from prunekit.errors import Unsupported

_OWNER = "_prunekit_owner"


class RaggedLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """The KV of one decoder layer.

    layout: which prompt tokens it holds; None: all of them. logical: tokens that have passed the layer, kept or not.
    Tokens after the prompt are never dropped: they are the tail, in order.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.layout: Layout | None = None
        self.logical = 0
        self._opened = False

    def open(self, tokens: int) -> None:
        """Count `tokens` logical tokens that now pass the layer, whether or not it writes KV for them."""
        self.logical += tokens
        self._opened = True

    @property
    def tail(self) -> int:
        """Tokens after the prompt."""
        return self.logical - self.layout.length if self.layout is not None else 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append physical keys and values, (B, A_kv, K, head_dim) each; returns all of them."""
        if not self._opened:
            raise Unsupported(
                "this KV cache was pruned under prunekit.apply and is used outside of it; "
                "continue inside the same `with` block, or start with a new cache"
            )
        self._opened = False
        return super().update(key_states, value_states)

    def get_seq_length(self) -> int:
        return self.logical

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.logical + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens; `tokens_to_remove` is 0 or negative. Raises Unsupported inside a pruned prompt."""
        if self.layout is not None and -tokens_to_remove > self.tail:
            raise Unsupported("cannot crop a KV cache into its pruned prompt; crop at most the generated tokens")
        if self.keys is not None:
            super().crop(tokens_to_remove)
        self.logical += tokens_to_remove

    def reset(self) -> None:
        super().reset()
        self.layout, self.logical, self._opened = None, 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.keys is not None:
            self._rows(torch.arange(self.keys.shape[0], device=self.keys.device).repeat_interleave(repeats))

    def _rows(self, rows: Tensor) -> None:
        if self.keys is not None and self.values is not None:
            self.keys = self.keys.index_select(0, rows.to(self.keys.device))
            self.values = self.values.index_select(0, rows.to(self.values.device))
        if self.layout is not None:
            self.layout = self.layout.select(rows)


def adopt(cache: Cache, layers: int, owner: object) -> None:
    """Put ragged layers into an empty cache and tie it to its owner. Raises Unsupported for other kinds of cache."""
    check(cache)
    cache.layers[:] = [RaggedLayer() for _ in range(layers)]
    setattr(cache, _OWNER, owner)


def check(cache: Cache) -> None:
    """Raise Unsupported unless `cache` is an empty DynamicCache whose layers attend to everything."""
    if type(cache) is not DynamicCache or any(type(layer) is not DynamicLayer for layer in cache.layers):
        kinds = sorted({type(layer).__name__ for layer in cache.layers}) or [type(cache).__name__]
        raise Unsupported(
            "pruning needs transformers' DynamicCache with full-attention layers (no static, sliding, quantized or "
            f"offloaded ones), not {type(cache).__name__} with {', '.join(kinds)}; "
            "leave `cache_implementation` and `past_key_values` at their defaults"
        )
    if cache.get_seq_length() > 0:
        raise Unsupported(
            "this KV cache was filled outside of prunekit.apply; prefill inside the `with` block, with a new cache"
        )


def owner_of(cache: Cache | None) -> Any:
    """Who adopted this cache; None if nobody did, or if it was emptied since."""
    filled = cache is not None and cache.get_seq_length() > 0
    return getattr(cache, _OWNER, None) if filled else None
