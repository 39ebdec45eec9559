"""Cuts between attention and MLP of a decoder layer.

The norm before the MLP sees the state after attention. There the stages decide; norm and MLP then run on the tokens
that stay, the MLP's output goes back to full width for the layer's own addition, and after the layer the rest is left
out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prunekit.engine.tokens.layout import take
from prunekit.errors import Unsupported
from prunekit.strategy.decisions import LayerAction

if TYPE_CHECKING:
    from prunekit.engine.decoder.session import Session
    from prunekit.engine.decoder.view import Here


@dataclass
class Mid:
    """The cuts inside one layer while it runs. slots: int64 (B, K'), those that stay; None: all. delta: what merging
    added to the states, float (B, K, H); None: nothing. width: K.
    """

    session: Session
    here: Here
    slots: Tensor | None = None
    delta: Tensor | None = None
    width: int = 0

    def decide(self, hidden: Tensor) -> Tensor:
        """Let the stages decide on the states after attention, (B, K, H); returns those that stay, (B, K', H)."""
        self.width, left = hidden.shape[1], hidden
        for cut in self.session.mid_cuts(self.here.number):
            if not any(self.session.counts):
                break
            merged, slots = self.session.cut(cut, left, self.here)
            if merged is not left:
                self._remember(merged - left)
            left = merged if slots is None else take(merged, slots, 1)
            if slots is not None:
                self.slots = slots if self.slots is None else self.slots.gather(1, slots)
        return left

    def _remember(self, change: Tensor) -> None:
        whole = self.widen(change)
        self.delta = whole if self.delta is None else self.delta + whole

    def widen(self, x: Tensor) -> Tensor:
        """(B, K', H) back to (B, K, H), zeros where tokens have left; fillings of short rows fall on those."""
        if self.slots is None:
            return x
        index = self.slots.to(x.device)[..., None].expand(-1, -1, x.shape[-1])
        return x.new_zeros(x.shape[0], self.width, x.shape[-1]).scatter(1, index, x)

    def leave(self, hidden: Tensor) -> Tensor:
        """The layer's output, (B, K, H), with what was merged, for the tokens that stay."""
        whole = hidden if self.delta is None else hidden + self.delta
        return whole if self.slots is None else take(whole, self.slots, 1)


_MID: ContextVar[Mid | None] = ContextVar("prunekit_mid", default=None)


@contextmanager
def cutting(session: Session, here: Here, actions: tuple[LayerAction, ...]) -> Iterator[Mid]:
    """While a layer runs, its cuts are made. Raises Unsupported when rows differ in what they do with the layer."""
    if set(actions) - {LayerAction.RUN, LayerAction.SKIP_ATTENTION}:
        raise Unsupported(
            f"a stage cuts inside layer {here.number}, which does not simply run for every sample; move the cut"
        )
    token = _MID.set(mid := Mid(session, here))
    try:
        yield mid
    finally:
        _MID.reset(token)


def norm_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """An override of the norm before the MLP."""

    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        mid = None if torch.compiler.is_compiling() else _MID.get()
        return original(hidden if mid is None else mid.decide(hidden), *args, **kwargs)

    return forward


def mlp_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """An override of the MLP."""

    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        mid = None if torch.compiler.is_compiling() else _MID.get()
        output = original(hidden, *args, **kwargs)
        if mid is None:
            return output
        return (mid.widen(output[0]), *output[1:]) if isinstance(output, tuple) else mid.widen(output)

    return forward
