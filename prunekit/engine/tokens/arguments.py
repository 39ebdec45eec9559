"""Arguments of a decoder layer beside states, mask, positions and cache: what has an entry for each token is cut along.

Decoders hand many things to their layers: scales of queries by position, inputs of each layer, types of tokens. Which
of the axes of such a tensor counts tokens is told by its length.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from prunekit.engine.tokens.layout import Layout, select_rows
from prunekit.errors import Unsupported
from prunekit.upstream import CACHE, SHARED_KV

# What `LayerCall` makes itself; `cache_position` counts the logical tokens of the cache, as masks do.
USUAL = frozenset({"attention_mask", "position_ids", "position_embeddings", "cache_position", SHARED_KV, CACHE})


def cut_along(name: str, value: Any, size: tuple[int, int], rows: Tensor | None, slots: Layout | None) -> Any:
    """The argument `name` of a layer for some rows of the batch and the slots of a layout.

    value: the argument for all rows and tokens, of which `size` is the number, (B, S). rows: int64 (B',); None: all.
    slots: of those rows; None: all tokens. A value without an axis of tokens comes back as it is, or with its rows if
    the first of its axes is the batch. Raises Unsupported for one that has tokens in some other way, such as a matrix
    of queries by keys, or inside of a list.
    """
    mine = _of_rows(value, size[0], rows)
    if slots is None or not any(size[1] in one.shape for one in _inside(value)):
        return mine
    axis = _token_axis(value, size) if isinstance(value, Tensor) else None
    if axis is None:
        kind = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"in a {type(value).__name__}"
        raise Unsupported(
            f"the decoder's layers are given `{name}`, {kind}, which depends on the {size[1]} tokens of the prompt in "
            "a way that prunekit does not know, so that it cannot be cut along; skip layers instead of dropping tokens"
        )
    return slots.gather(mine, axis)


def _of_rows(value: Any, batch: int, rows: Tensor | None) -> Any:
    has = isinstance(value, Tensor) and value.ndim > 1 and value.shape[0] == batch
    return select_rows(value, rows) if has else value


def _token_axis(value: Tensor, size: tuple[int, int]) -> int | None:
    """The axis of tokens of (B|1, S), (B|1, S, numbers) or a tensor with one such axis; None where it is unclear."""
    axes = [axis for axis in range(1, value.ndim) if value.shape[axis] == size[1]]
    if not axes or value.shape[0] not in (1, size[0]):
        return None
    return axes[0] if len(axes) == 1 or (value.ndim == 3 and axes[0] == 1) else None


def _inside(value: Any) -> Iterable[Tensor]:
    """All tensors in lists, tuples and dicts."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [one for part in parts for one in _inside(part)]
