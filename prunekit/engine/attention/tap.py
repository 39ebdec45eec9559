"""What an attention module hands to its kernel: rotated queries, keys, values and the mask, without a full map.

Every decoder attention of transformers asks the public `AttentionInterface` for its kernel, by `get_interface(name,
default)`; under eager attention the default, its own function, comes back. While somebody needs it, that one method
gives a function that notes its arguments and goes on, for the module that is watched in the current context and for no
other. Under sdpa, eager and flash names alike, nothing is computed for it, and no configuration is touched.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from transformers.modeling_utils import AttentionInterface

from prunekit.engine.attention.decoder_rows import Attended
from prunekit.errors import Unsupported

METHOD = "get_interface"


class Aborted(Exception):
    """Leaves a layer once its attention has been noted."""


class Watcher(Protocol):
    """Something that wants to see what attention kernels are called with."""

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, an attention kernel, with an eye on its arguments."""


@dataclass
class Watch:
    """Notes what one attention module hands to its kernel. abort: leave by `Aborted` instead of running the kernel."""

    module: nn.Module
    abort: bool = False
    noted: Attended | None = None

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, an attention kernel, with an eye on `module`."""

        @functools.wraps(function)
        def attend(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **kwargs: Any
        ) -> Any:
            if module is self.module:
                # Detached by Attended.of: under checkpointing the layer runs a second time, outside of the watch.
                self.noted = Attended.of(module, query, key, value, attention_mask, kwargs)
                if self.abort:
                    raise Aborted
            return function(module, query, key, value, attention_mask, *args, **kwargs)

        return attend

    @property
    def result(self) -> Attended:
        """What was noted. Raises Unsupported if the module has not asked `AttentionInterface` for its kernel."""
        if self.noted is None:
            raise Unsupported(
                f"attention rows, keys and values of {type(self.module).__name__} are not available: it does not take "
                "its kernel from transformers' AttentionInterface; use stages that need none"
            )
        return self.noted


_WATCH: ContextVar[Watcher | None] = ContextVar("prunekit_watch", default=None)

W = TypeVar("W", bound=Watcher)


@contextmanager
def watching(watch: W) -> Iterator[W]:
    """Within the block, `watch` sees the calls of attention kernels, if `patch` is in. The newest one sees them."""
    token = _WATCH.set(watch)
    try:
        yield watch
    finally:
        _WATCH.reset(token)


class _Patch:
    """Counts who needs the watch; the first puts it on `AttentionInterface`, the last takes it off."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users = 0
        self.original: Callable[..., Any] | None = None

    def acquire(self) -> None:
        with self.lock:
            if self.users == 0:
                self.original = _method()
                setattr(AttentionInterface, METHOD, _watched(self.original))
            self.users += 1

    def release(self) -> None:
        with self.lock:
            self.users -= 1
            if self.users == 0:
                setattr(AttentionInterface, METHOD, self.original)


def _method() -> Callable[..., Any]:
    found: Callable[..., Any] | None = AttentionInterface.__dict__.get(METHOD)
    if found is None:
        raise Unsupported(
            f"this transformers version has no AttentionInterface.{METHOD}, through which prunekit reads attention "
            "rows, keys and values; use a version that pyproject.toml names, or stages that need none"
        )
    return found


patch = _Patch()


def _watched(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_interface(self: AttentionInterface, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        function: Callable[..., Any] = original(self, *args, **kwargs)
        if torch.compiler.is_compiling():  # context variables cannot be traced, and decoding steps are not watched
            return function
        watch = _WATCH.get()
        return function if watch is None else watch.around(function)

    return get_interface
