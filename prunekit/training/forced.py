"""Decisions that replace a router's own on a model, and a record of what the router is given to decide on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from prunekit.hookspecs import hookimpl
from prunekit.pipeline.stage import Stage
from prunekit.strategy.decisions import Route

Decide = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Shown:
    """What a router is given of a batch, padded on the right: embeds float (B, S, H), visual and valid bool (B, S)."""

    embeds: Tensor
    visual: Tensor
    valid: Tensor

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        counts: list[int] = self.valid.sum(1).tolist()
        return counts


@dataclass
class _Decider:
    """Stands in for a router's `route`: row by row, `decide(row, embeds, visual)` gives scores (S,) and (N,).

    behind: how many tokens of each row follow its prompt, which the router is not given. None: none.
    """

    decide: Decide
    behind: Sequence[int] | None = None
    seen: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @hookimpl(tryfirst=True)
    def route(self, embeds: Tensor, visual: Tensor, valid: Tensor) -> Route:
        """The decision in place of the strategy's, for one sample or for the batch, as it is called."""
        if embeds.ndim == 2:
            tokens, layers = self._row(embeds, visual)
            return Route(tokens, layers)
        rows = [self._row(e[v], s[v]) for e, s, v in zip(embeds, visual, valid, strict=True)]
        tokens = torch.zeros(valid.shape, dtype=rows[0][0].dtype, device=valid.device)
        tokens = tokens.masked_scatter(valid, torch.cat([row for row, _ in rows]))
        return Route(tokens, torch.stack([layers for _, layers in rows]))

    def _row(self, embeds: Tensor, visual: Tensor) -> tuple[Tensor, Tensor]:
        row, prompt = len(self.seen), len(embeds)
        if self.behind is not None:
            prompt -= self.behind[row]
        self.seen.append((embeds[:prompt].detach().float(), visual[:prompt]))  # learners compute in float32
        tokens, layers = self.decide(row, *self.seen[row])
        return F.pad(tokens, (0, len(embeds) - prompt)), layers


@contextmanager
def deciding(stage: Stage, decide: Decide, behind: Sequence[int] | None = None) -> Iterator[_Decider]:
    """Within the block, `decide` answers for the router of `stage`; one prefill at a time.

    behind: how many tokens of each row follow its prompt, which the router is not given. None: none.
    """
    decider = _Decider(decide, behind)
    stage.manager.register(decider, name="decider")
    try:
        yield decider
    finally:
        stage.manager.unregister(decider)


def shown(seen: Sequence[tuple[Tensor, Tensor]]) -> Shown:
    """The recorded rows as one batch."""
    embeds = pad_sequence([row for row, _ in seen], batch_first=True)
    visual = pad_sequence([row for _, row in seen], batch_first=True)
    valid = pad_sequence([torch.ones_like(row) for _, row in seen], batch_first=True)
    return Shown(embeds, visual, valid)
