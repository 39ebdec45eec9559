"""What an attention module hands to its kernel: rotated queries, keys, values and the mask, without a full map.

Every decoder attention of transformers asks the public `AttentionInterface` for its kernel, by `get_interface(name,
default)`; under eager attention the default, its own function, comes back; blocks of vision towers do the same. While
somebody needs it, that one method gives a function that hands its arguments to a tap and goes on, for the modules that
are tapped in the current context and for no other. Under sdpa, eager and flash names alike, nothing is computed for it,
and no configuration is touched.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import AttentionInterface

from prunekit.engine.attention.attended import Attended
from prunekit.engine.patches import Patch
from prunekit.errors import Unsupported

METHOD = "get_interface"


class Aborted(Exception):
    """Leaves a layer once its attention has been recorded."""


@dataclass
class Record:
    """What one attention module handed to its kernel in its newest call. abort: leave by `Aborted`, before it runs."""

    module: nn.Module
    abort: bool = False
    attended: Attended | None = None

    def take(self, attended: Attended) -> None:
        """Keep what one call was given."""
        self.attended = attended
        if self.abort:
            raise Aborted

    @property
    def result(self) -> Attended:
        """What was recorded. Raises Unsupported if the module has not asked `AttentionInterface` for its kernel."""
        if self.attended is None:
            raise Unsupported(
                f"attention rows, keys and values of {type(self.module).__name__} are not available: it does not take "
                "its kernel from transformers' AttentionInterface; use stages that need none"
            )
        return self.attended


# By attention module, who wants to have what its calls are given.
Taps = Mapping[nn.Module, Callable[[Attended], None]]
# AttentionInterface is global to the process, and threads may run the same modules at once: each context has its taps.
_TAPS: ContextVar[Taps | None] = ContextVar("prunekit_taps", default=None)


@contextmanager
def tapped(taps: Taps) -> Iterator[None]:
    """Within the block, `taps` get what their modules hand to their kernels; those of outer blocks do not.

    Blocks are short: decoding steps, where every call counts, find `AttentionInterface` as it was.
    """
    token = _TAPS.set(taps)
    try:
        with _patch if taps else nullcontext():
            yield
    finally:
        _TAPS.reset(token)


@contextmanager
def recorded(record: Record) -> Iterator[Record]:
    """The same for one record."""
    with tapped({record.module: record.take}):
        yield record


def method() -> Callable[..., Any]:
    """The method of `AttentionInterface` that taps go on. Raises Unsupported for versions that have none."""
    found: Callable[..., Any] | None = AttentionInterface.__dict__.get(METHOD)
    if found is None:
        raise Unsupported(
            f"this transformers version has no AttentionInterface.{METHOD}, through which prunekit reads attention "
            "rows, keys and values; use a version that pyproject.toml names, or stages that need none"
        )
    return found


def _tapping(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_interface(self: AttentionInterface, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        function: Callable[..., Any] = original(self, *args, **kwargs)
        # Context variables cannot be traced, and decoding steps are not tapped.
        if torch.compiler.is_dynamo_compiling():
            return function
        taps = _TAPS.get()
        return function if taps is None else _around(function, taps)

    return get_interface


def _around(function: Callable[..., Any], taps: Taps) -> Callable[..., Any]:
    """`function`, an attention kernel, that first hands its arguments to the tap of its module."""

    @functools.wraps(function)
    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if module in taps:
            # Detached by Attended.of: under checkpointing the layer runs a second time, outside of the block.
            taps[module](Attended.of(module, query, key, value, attention_mask, kwargs))
        return function(module, query, key, value, attention_mask, *args, **kwargs)

    return attend


_patch = Patch(AttentionInterface, METHOD, _tapping)
