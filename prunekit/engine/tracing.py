"""What becomes of overrides under `torch.compile`: a graph breaks in front of them, and they run as they are written.

Stages decide by what they see, and the pass that runs is in a context variable; neither can be traced. What can be is a
decoding step on a static cache, which needs nothing but that cache: while one is traced, overrides of parts of a layer
stand back.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

REASON = (
    "prunekit decides while the model runs, which cannot be traced: under a pruning pipeline only decoding steps on a "
    "StaticCache that was filled under it are one graph; compile without fullgraph=True"
)
_TAKEN = inspect.signature(torch.compiler.disable).parameters
_OPTIONS: dict[str, Any] = {"reason": REASON} if "reason" in _TAKEN else {}  # not before PyTorch 2.7


class _Step:
    """traced: whether a decoding step on a static cache is being traced. Outside of tracing it is never set."""

    traced = False


STEP = _Step()


def _untraced(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


# Calls a function with dynamo switched off, for all that it calls; a graph ends in front of it.
untraced: Callable[..., Any] = torch.compiler.disable(_untraced, **_OPTIONS)  # type: ignore[no-untyped-call]


def traced_step(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function that is traced as part of a decoding step on a static cache."""
    STEP.traced = True
    try:
        return function(*args, **kwargs)
    finally:
        STEP.traced = False


def is_compiled(module: nn.Module) -> bool:
    """Whether `torch.compile` is on a module or on a part of it."""
    return any(
        getattr(part, "_compiled_call_impl", None) is not None
        or hasattr(part.__dict__.get("forward"), "_torchdynamo_orig_callable")
        for part in module.modules()
    )


def as_it_is(original: Callable[..., Any]) -> Callable[..., Any]:
    """For an override that only keeps what it is on from being traced: kernels are read, and stand-ins for the KV cache
    are called, in plain Python.
    """
    return original


def as_written(override: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """`override`, which is never traced; in a traced decoding step `original`."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_dynamo_compiling():
            return override(*args, **kwargs)
        return original(*args, **kwargs) if STEP.traced else untraced(override, *args, **kwargs)

    return forward
