"""Which tokens reach a site, as indices: the visual ones and the text."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from prunekit.engine.decoder.state import BatchState
from prunekit.engine.tokens.layout import Layout, leftmost
from prunekit.ops.host import on_device


@dataclass(frozen=True, eq=False)
class SiteTokens:
    """The tokens that reach a site, left-aligned; columns past a row's number of them are padding.

    layout: of the tokens that reach it. visual: bool (B, K), slots of visual tokens. counts: visual tokens of each row.
    """

    state: BatchState
    layout: Layout
    visual: Tensor
    counts: tuple[int, ...]

    @cached_property
    def slots(self) -> Tensor:
        """Physical slots of the visual tokens, int64 (B, V)."""
        return leftmost(self.visual, max(self.counts))

    @cached_property
    def positions(self) -> Tensor:
        """Their logical positions, int64 (B, V)."""
        return self.layout.index.gather(1, self.slots)

    @cached_property
    def ordinals(self) -> Tensor:
        """Their numbers among the row's original visual tokens, int64 (B, V), meaningless on padding."""
        return self.state.prompt.ordinals.gather(1, self.positions).clamp_min(0)

    @cached_property
    def valid(self) -> Tensor:
        """False on padding, bool (B, V)."""
        columns = torch.arange(self.slots.shape[1], device=self.slots.device)
        return columns < on_device(self.counts, self.slots.device)[:, None]

    @cached_property
    def sizes(self) -> Tensor:
        """How many original tokens each stands for, float (B, V); 1 on padding."""
        if self.layout.sizes is None:
            return torch.ones_like(self.valid, dtype=torch.float32)
        return self.layout.sizes.gather(1, self.slots).masked_fill(~self.valid, 1.0)

    @cached_property
    def text_counts(self) -> tuple[int, ...]:
        """Text tokens of each row."""
        prompt = self.state.prompt
        return tuple(length - count for length, count in zip(prompt.lengths, prompt.visual_counts, strict=True))

    @cached_property
    def text_positions(self) -> Tensor:
        """Logical positions of the text tokens, int64 (B, T)."""
        return leftmost(self.state.text, max(self.text_counts))

    @cached_property
    def text_valid(self) -> Tensor:
        """False on their padding, bool (B, T)."""
        return self.state.text.gather(1, self.text_positions)

    @cached_property
    def text_slots(self) -> Tensor:
        """Physical slots of the text tokens, int64 (B, T)."""
        return self.slot_of.gather(1, self.text_positions)

    @cached_property
    def slot_of(self) -> Tensor:
        """For each logical position the slot that holds it now, int64 (B, S)."""
        return self.layout.slot_of()
