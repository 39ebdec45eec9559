"""What hooks may ask for, computed when asked: the visual tokens of a prompt batch as they stand at a site."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from prunekit.decisions import Rows
from prunekit.engine.layout import Layout, leftmost
from prunekit.engine.prompt import Prompt


@dataclass(frozen=True)
class View:
    """The visual tokens that reach one stage. Its properties named in the hook specifications are the inputs of hooks.

    hidden_states: float (B, K, H), physical, as they enter the site. visual: bool (B, K), slots of visual tokens.
    counts: visual tokens of each row. count: how many to leave, None if the stage takes no `keep`.
    rows: gives the attention rows (B, A, S) over logical positions. heads: how they become one.
    """

    prompt: Prompt
    layout: Layout
    hidden_states: Tensor
    visual: Tensor
    counts: tuple[int, ...]
    count: tuple[int, ...] | None
    rows: Callable[[], Tensor]
    heads: Rows
    grid: Callable[[int], Tensor]
    state: dict[Any, Any]

    @cached_property
    def slots(self) -> Tensor:
        """Physical slots of the visual tokens, int64 (B, V); columns past a row's `counts` are padding."""
        return leftmost(self.visual, max(self.counts))

    @cached_property
    def positions(self) -> Tensor:
        """Their logical positions, int64 (B, V)."""
        return self.layout.index.gather(1, self.slots)

    @cached_property
    def ordinals(self) -> Tensor:
        """Their numbers among the row's original visual tokens, int64 (B, V), meaningless on padding."""
        return self.prompt.ordinals.gather(1, self.positions).clamp_min(0)

    @cached_property
    def valid(self) -> Tensor:
        columns = torch.arange(self.slots.shape[1], device=self.slots.device)
        return columns < torch.tensor(self.counts, device=self.slots.device)[:, None]

    @cached_property
    def hidden(self) -> Tensor:
        states = self.hidden_states.detach()
        index = self.slots.to(states.device)[..., None].expand(-1, -1, states.shape[-1])
        return states.gather(1, index).masked_fill(~self.valid.to(states.device)[..., None], 0.0)

    @cached_property
    def coords(self) -> Tensor:
        index = self.ordinals[..., None].expand(-1, -1, 5)
        return self.prompt.coords(self.grid).gather(1, index).masked_fill(~self.valid[..., None], -1)

    @cached_property
    def attention(self) -> Tensor:
        rows = self.rows()
        one = rows.mean(1) if self.heads.heads == "mean" else rows.amax(1)
        return one.gather(1, self.positions.to(one.device)).masked_fill(~self.valid.to(one.device), 0.0)

    @property
    def seed(self) -> tuple[int, ...]:
        return self.prompt.seeds

    def of_sample(self, name: str, b: int) -> Any:
        """Input `name` of sample b: unpadded, without the batch axis; `state` is a dict of the sample's own."""
        value = getattr(self, name)
        if name == "state":
            return value.setdefault(b, {})
        if value is None or name in ("count", "seed"):
            return value if value is None else value[b]
        return value[b, : self.counts[b]]
