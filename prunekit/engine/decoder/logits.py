"""Looking at what a model writes: whether logits are finite, in the prefill and in every step that is not compiled."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.engine.decoder.state import BatchState

# The prompt batch whose decoder ran last in this context: logits that are made next are its own.
_RUNNING: ContextVar[weakref.ref[BatchState] | None] = ContextVar("prunekit_running", default=None)


def ran(state: BatchState) -> None:
    """The decoder has just been called for this prompt batch."""
    _RUNNING.set(weakref.ref(state))


def watched(base: nn.Module) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """An override of the head of a model, `base` its model without the head."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            logits = original(*args, **kwargs)
            if torch.compiler.is_compiling():
                return logits
            running = _RUNNING.get()
            state = None if running is None else running()
            if state is not None and state.parts.base is base and isinstance(logits, Tensor):
                _look(state, logits.detach())
            return logits

        return forward

    return make


def _look(state: BatchState, logits: Tensor) -> None:
    """Remember the samples whose logits, (B, L, vocabulary), are not finite; padding means nothing."""
    rows, tokens = logits.shape[0], logits.shape[1] if logits.ndim == 3 else 0
    if rows != len(state.lengths) or not tokens:
        return  # of another batch
    low, high = logits.amin(-1), logits.amax(-1)  # `aminmax` took twelve times as long for 150,000 words on a CPU
    wrong = (low - low) != (high - high)  # NaN where one is not finite, else 0; of less parts than `isfinite`
    if tokens == state.prompt.real.shape[1]:
        wrong = wrong & state.prompt.real.to(wrong.device)
    state.see("logits", wrong.any(1) if tokens == state.prompt.real.shape[1] else wrong[:, -1])
