"""Cuts between attention and MLP of a decoder layer.

The norm before the MLP sees the state after attention. There the stages decide; norm and MLP then run on the tokens
that stay, the MLP's output goes back to full width for the layer's own addition, and after the layer the rest is left
out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from prunekit.engine.tokens.layout import take

# Decides about physical states (B, K, H): returns them with what was merged, and the slots that remain, int64 (B, K');
# None: all.
Decide = Callable[[Tensor], tuple[Tensor, Tensor | None]]


@dataclass
class MidCuts:
    """The cuts inside one layer while it runs.

    slots: int64 (B, K'), those that stay; None: all. delta: what merging added to the states, float (B, K, H); None:
    nothing. width: K.
    """

    cuts: Sequence[Decide]
    slots: Tensor | None = None
    delta: Tensor | None = None
    width: int = 0

    def decide(self, hidden: Tensor) -> Tensor:
        """Let the stages decide on the states after attention, (B, K, H); returns those that stay, (B, K', H)."""
        self.width, staying = hidden.shape[1], hidden
        for cut in self.cuts:
            merged, slots = cut(staying)
            if merged is not staying:
                self._remember(merged - staying)
            staying = merged if slots is None else take(merged, slots, 1)
            if slots is not None:
                self.slots = slots if self.slots is None else self.slots.gather(1, slots)
        return staying

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
