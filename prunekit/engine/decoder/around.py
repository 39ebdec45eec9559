"""Cuts in front of a decoder that is not known inside: it is given a prompt that never held the tokens that left.

The others stand at their original positions. Its cache is its own and holds what it was given; outside of the decoder
that cache still answers in logical lengths, from which `generate` and M-RoPE models count positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from functools import cache as memoised
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from prunekit.engine.cache.ragged import adopt_as_it_is, check_crop
from prunekit.engine.decoder.forward_pass import Here
from prunekit.engine.decoder.prefill import Prefill
from prunekit.engine.decoder.state import BatchState
from prunekit.engine.tokens import masks
from prunekit.engine.tokens.layout import Layout, per_token, take
from prunekit.errors import Unsupported
from prunekit.families.base import Parts
from prunekit.strategy.sites import ENCODER
from prunekit.upstream import CACHE

# Whether the decoder itself runs in this thread, which asks its cache for what it really holds.
INSIDE: ContextVar[bool] = ContextVar("prunekit_inside", default=False)


def prefill(current: Prefill, original: Callable[..., Any], kwargs: Mapping[str, Any]) -> Any:
    """Let tokens leave, and call the decoder with those that remain: its output, for physical tokens.

    kwargs: arguments of the decoder's call, logical; `inputs_embeds` float (B, S, H) among them.
    """
    state, cutter = current.state, current.cutter
    current.readings.begin(kwargs["inputs_embeds"])
    hidden = cutter.at(ENCODER, cutter.leave_tower(kwargs["inputs_embeds"]), Here(current, 0, kwargs))
    if state.layout is None:
        return _run(original, {**kwargs, "inputs_embeds": hidden})
    local = {name: _local(state, name, value) for name, value in kwargs.items() if name != "inputs_embeds"}
    if local.get("position_ids") is None:
        local["position_ids"] = state.layout.index
    local["attention_mask"] = _prefill_mask(kwargs.get("attention_mask"), state.layout, hidden, current.kind)
    return _run(original, {**local, "inputs_embeds": hidden})


def decode(state: BatchState, original: Callable[..., Any], kwargs: Mapping[str, Any], kind: masks.Kind) -> Any:
    """Call the decoder with new tokens on a cache that holds the prompt's remaining ones."""
    layout, new = state.layout, kwargs["inputs_embeds"]
    if layout is None:
        return _run(original, kwargs)
    cache, tokens = kwargs[CACHE], new.shape[1]
    past = cache.get_seq_length()
    local = dict(kwargs)
    if local.get("position_ids") is None:
        local["position_ids"] = torch.arange(past, past + tokens, device=new.device).expand(len(new), -1)
    tail = past + tokens - layout.length
    local["attention_mask"] = _decode_mask(kwargs.get("attention_mask"), layout, tail, new, kind)
    return _run(original, local)


def finish(state: BatchState, cache: Cache | None) -> None:
    """Tie the cache to the prompt batch, and let it answer in logical lengths."""
    if cache is None:
        return
    adopt_as_it_is(cache, state)
    if state.layout is not None:
        kind: Any = type(cache)
        cache.__class__ = _logical(kind)


@memoised
def _logical(kind: type[Cache]) -> type[Cache]:
    """A cache of this kind that outside of the decoder counts the tokens that left."""

    class Around(kind):  # type: ignore[valid-type, misc]
        def get_seq_length(self, layer_idx: int = 0) -> int:
            held: int = super().get_seq_length(layer_idx)
            layout: Layout = self._prunekit_owner.layout
            return held if INSIDE.get() or not held else held + layout.length - layout.width

        def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
            length, offset = super().get_mask_sizes(query_length, layer_idx)
            layout: Layout = self._prunekit_owner.layout
            return length if INSIDE.get() else length + layout.length - layout.width, offset

        def crop(self, tokens_to_remove: int) -> None:
            layout: Layout = self._prunekit_owner.layout
            length = self.get_seq_length()
            # Versions of transformers before 5.15 give the length that is to remain.
            removed = length - tokens_to_remove if tokens_to_remove > 0 else -tokens_to_remove
            check_crop(removed, length - layout.length)
            gap = layout.length - layout.width
            super().crop(tokens_to_remove - gap if tokens_to_remove > 0 else tokens_to_remove)

    Around.__name__ = Around.__qualname__ = f"{kind.__name__}Around"
    return Around


def _run(original: Callable[..., Any], kwargs: Mapping[str, Any]) -> Any:
    token = INSIDE.set(True)
    try:
        return original(**kwargs)
    finally:
        INSIDE.reset(token)


def check(parts: Parts) -> None:
    """Raise Unsupported for kernels that would see another prompt."""
    if "flash" in parts.attention_implementation:
        raise Unsupported(
            "flash kernels read gaps in the positions of a shorter prompt as borders of packed sequences; load the "
            "model with attn_implementation='sdpa'"
        )


def _local(state: BatchState, name: str, value: Any) -> Any:
    """An argument of the decoder for the tokens that remain: what has an entry for each token, or for each visual one.

    Raises Unsupported for a tensor with as many entries as tokens on another axis.
    """
    layout, shape = state.full_layout(), tuple(state.prompt.ids.shape)
    if isinstance(value, list | tuple) and value and all(isinstance(one, Tensor) for one in value):
        return type(value)(_local(state, name, one) for one in value)
    if not isinstance(value, Tensor) or name == "attention_mask":
        return value
    length = shape[1]
    if value.ndim == 3 and name == "position_ids":  # (axes, B, S)
        return torch.stack([take(axis, layout.index, 1) for axis in value])
    if value.shape[:2] == shape or (value.shape[:1] == (1,) and value.shape[1:2] == (length,)):
        mine = layout.gather(value)
        # A filling is nothing that is to be marked, such as a visual token to which features are added.
        return mine & per_token(layout.present, mine) if mine.dtype == torch.bool else mine
    if value.shape[:1] == (int(state.prompt.visual.sum()),):  # of every visual token of the batch, such as DeepStack's
        return value[state.alive_visual()[state.prompt.visual].to(value.device)]
    if value.ndim > 1 and length in value.shape and not value.is_floating_point():
        raise Unsupported(f"{name} {tuple(value.shape)} of this decoder cannot be cut along with the tokens")
    return value


def _prefill_mask(mask: Any, layout: Layout, like: Tensor, kind: masks.Kind) -> Any:
    """Masks are always given: without one a decoder may read gaps in positions as borders of packed sequences."""
    if isinstance(mask, dict):
        return {name: _prefill_mask(one, layout, like, kind) for name, one in mask.items()}
    if isinstance(mask, Tensor) and mask.ndim == 4:
        return masks.prefill_mask(mask, layout, layout, like, kind)
    if mask is None:
        return layout.present.to(torch.int64)
    return masks.prefill_mask(mask, layout, layout, like, "flat")


def _decode_mask(mask: Any, layout: Layout, tail: int, like: Tensor, kind: masks.Kind) -> Any:
    if isinstance(mask, dict):
        return {name: _decode_mask(one, layout, tail, like, kind) for name, one in mask.items()}
    if isinstance(mask, Tensor) and mask.ndim == 4:
        return masks.decode_mask(mask, layout, tail, like.shape[1], like, kind)
    local = masks.decode_mask(mask, layout, tail, like.shape[1], like, "flat")
    return local if local is None else local.to(torch.int64)
