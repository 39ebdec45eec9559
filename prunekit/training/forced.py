"""Putting decisions on a model in place of a router's own, and taking down what the router is shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from prunekit.decisions import Route
from prunekit.hookspecs import hookimpl
from prunekit.stage import Stage

Decide = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Shown:
    """What a router sees of a batch, padded on the right: embeds float (B, S, H), visual and valid bool (B, S)."""

    embeds: Tensor
    visual: Tensor
    valid: Tensor

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        found: list[int] = self.valid.sum(1).tolist()
        return found


@dataclass
class _Teller:
    """Stands in for a router's `route`: row by row, `decide(row, embeds, visual)` gives scores (S,) and (N,)."""

    decide: Decide
    seen: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @hookimpl(tryfirst=True)
    def route(self, embeds: Tensor, visual: Tensor, valid: Tensor) -> Route:
        """Answer in place of the strategy, for one sample or for the batch, as it is called."""
        if embeds.ndim == 2:
            tokens, layers = self._row(embeds, visual)
            return Route(tokens, layers)
        rows = [self._row(e[v], s[v]) for e, s, v in zip(embeds, visual, valid, strict=True)]
        tokens = torch.zeros(valid.shape, dtype=rows[0][0].dtype, device=valid.device)
        tokens = tokens.masked_scatter(valid, torch.cat([row for row, _ in rows]))
        return Route(tokens, torch.stack([layers for _, layers in rows]))

    def _row(self, embeds: Tensor, visual: Tensor) -> tuple[Tensor, Tensor]:
        self.seen.append((embeds.detach(), visual))
        return self.decide(len(self.seen) - 1, embeds, visual)


@contextmanager
def deciding(stage: Stage, decide: Decide) -> Iterator[_Teller]:
    """Within the block, `decide` answers for the router of `stage`; one prefill at a time."""
    teller = _Teller(decide)
    stage.manager.register(teller, name="told")
    try:
        yield teller
    finally:
        stage.manager.unregister(teller)


def shown(seen: Sequence[tuple[Tensor, Tensor]]) -> Shown:
    """What was taken down, as one batch."""
    embeds = pad_sequence([row for row, _ in seen], batch_first=True)
    visual = pad_sequence([row for _, row in seen], batch_first=True)
    valid = pad_sequence([torch.ones_like(row) for _, row in seen], batch_first=True)
    return Shown(embeds, visual, valid)
