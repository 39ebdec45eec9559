"""What a trace tells of a stage's answer beside which tokens stay: where the others went, and by which scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prunekit.strategy.decisions import Owners, Selection


@dataclass(frozen=True)
class RowDetail:
    """The same of one sample as plain numbers, by numbers of visual tokens.

    joins: for each token that was merged into others, these; scores: those of the tokens that have one; None: the
    strategy does not score.
    """

    joins: Mapping[int, tuple[int, ...]]
    scores: Mapping[int, float] | None


@dataclass(frozen=True, eq=False)
class Detail:
    """An answer on its device, until somebody asks for a trace.

    ordinals: int64 (B, V), numbers among the original visual tokens of the sample, or in the tower of the input.
    entered: how many of the columns are tokens. selection: with shapes (B, V). scores: float (B, V), NaN where there is
    none; None: the strategy does not score.
    """

    ordinals: Tensor
    entered: tuple[int, ...]
    selection: Selection
    scores: Tensor | None

    def among(self, numbers: Sequence[Tensor]) -> Detail:
        """The same among more tokens: number n of sample b becomes `numbers[b][n]`, int64 (V,) each."""
        table = torch.nn.utils.rnn.pad_sequence(list(numbers), batch_first=True).to(self.ordinals.device)
        return replace(self, ordinals=table.gather(1, self.ordinals.clamp_max(max(table.shape[1] - 1, 0))))

    def row(self, b: int) -> RowDetail:
        """Of sample b; reads tensors back from their device."""
        names = self.ordinals[b, : self.entered[b]].tolist()
        scores = None
        if self.scores is not None:
            rows = zip(names, self.scores[b, : len(names)].tolist(), strict=True)
            scores = {name: score for name, score in rows if not math.isnan(score)}
        return RowDetail(self._joins(b, names), scores)

    def _joins(self, b: int, names: Sequence[int]) -> dict[int, tuple[int, ...]]:
        weights, count = self.selection.weights, len(names)
        if weights is None:
            return {}
        keep = self.selection.keep[b, :count].tolist()
        left = [column for column, stays in enumerate(keep) if not stays]
        if isinstance(weights, Owners):
            owner = weights.owner[b, :count].tolist()
            return {names[column]: (names[owner[column]],) for column in left if owner[column] >= 0}
        takes = (weights[b, :count, :count] != 0).T.tolist()
        joined = {column: [row for row in range(count) if keep[row] and takes[column][row]] for column in left}
        return {names[column]: tuple(names[row] for row in rows) for column, rows in joined.items() if rows}
