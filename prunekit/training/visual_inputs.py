"""Images and videos are encoded once for all candidates of a batch: the vision tower gives each the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from prunekit.engine.overrides import Overrides
from prunekit.families.base import Parts


@contextmanager
def encoded_once(parts: Parts) -> Iterator[None]:
    """Within the block, a method that encodes images or videos returns its earlier output for equal arguments.

    For pipelines that leave the tower alone, and outside of any `apply`.
    """
    overrides = Overrides()
    try:
        for modality in parts.modalities:
            overrides.replace(parts.base, modality.method, _remembering)
        yield
    finally:
        overrides.restore()


def _remembering(original: Callable[..., Any]) -> Callable[..., Any]:
    earlier: list[tuple[tuple[Any, ...], dict[str, Any], Any]] = []

    def encode(*args: Any, **kwargs: Any) -> Any:
        for before, named, output in earlier:
            if _same(args, before) and kwargs.keys() == named.keys() and all(_same(kwargs[k], named[k]) for k in named):
                return output
        output = original(*args, **kwargs)
        earlier.append((args, kwargs, output))
        return output

    return encode


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and _equal(one, other)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


def _equal(one: Tensor, other: Tensor) -> bool:
    return one is other or (one.dtype == other.dtype and one.device == other.device and torch.equal(one, other))
