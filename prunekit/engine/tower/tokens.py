"""Which tokens of the vision tower are still there, and which patches make which visual token: pure tensors.

The tower's batch has R rows, one for each crop or frame, of T tokens: leading ones such as CLS, then patches. Outside
of a block its states keep that shape; inside, a block runs on the tokens that are left, as in token merging
(https://arxiv.org/abs/2210.09461).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from prunekit.engine.tokens.layout import leftmost, take


@dataclass(frozen=True, eq=False)
class Left:
    """The tokens that are left of each row, in ascending order.

    index: int64 (R, K), the token in each slot; short rows are filled with dropped ones, so that no slot repeats.
    lengths: tokens that are left of each row. sizes: float (R, T), how many tokens each stands for; None: one each.
    """

    index: Tensor
    lengths: tuple[int, ...]
    sizes: Tensor | None = None

    @classmethod
    def of(cls, there: Tensor, lengths: Sequence[int], sizes: Tensor | None) -> Left:
        """From bool (R, T) and its sums, which are on the host."""
        return cls(leftmost(there, max(*lengths, 1)), tuple(lengths), sizes)

    def gather(self, x: Tensor) -> Tensor:
        """(R, T, ...) to the slots, (R, K, ...)."""
        return take(x, self.index, 1)

    def put(self, x: Tensor, into: Tensor) -> Tensor:
        """`into` (R, T, ...) with `x` (R, K, ...) in the places of its slots. Fillings go to dropped tokens."""
        index = self.index.to(x.device).view(*self.index.shape, *[1] * (x.ndim - 2))
        return into.scatter(1, index.expand_as(x), x)

    @cached_property
    def valid(self) -> Tensor | None:
        """bool (R, K), False on fillings; None: there are none. A row with nothing left shows its first filling."""
        if min(self.lengths) == self.index.shape[1]:
            return None
        lengths = torch.tensor(self.lengths, device=self.index.device).clamp_min(1)
        return torch.arange(self.index.shape[1], device=self.index.device) < lengths[:, None]

    def mask(self, given: Tensor | None, hidden: Tensor, additive: bool) -> Tensor | None:
        """The attention mask of a block's slots, from its mask for all tokens (R, 1, 1 or T, T), bool or additive.

        Padding of a crop of which nothing else is left sees itself, where stock attention would see nothing at all.
        """
        valid = None if self.valid is None else self.valid.to(hidden.device)[:, None, None]
        local = given
        if given is not None:
            local = take(given, self.index, 3)
            local = local if given.shape[2] == 1 else take(local, self.index, 2)
            seen = visible(local) if valid is None else visible(local) & valid
            local = torch.where(seen.any(-1, keepdim=True), local, True if local.dtype == torch.bool else 0.0)
        if self.sizes is None and not additive:
            return both(local, valid, hidden)
        total = as_bias(valid, hidden)
        if self.sizes is not None:
            wide = torch.promote_types(hidden.dtype, torch.float32)
            bias = self.gather(self.sizes.to(hidden.device, wide)).log().to(hidden.dtype)[:, None, None]
            total = bias if total is None else total + bias
        return both(as_bias(local, hidden), total, hidden)


def visible(mask: Tensor) -> Tensor:
    """A mask, bool or additive, as bool."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def both(first: Tensor | None, second: Tensor | None, hidden: Tensor) -> Tensor | None:
    """Two masks at once, None where there is none; bool if both are."""
    if first is None or second is None:
        return second if first is None else first
    if first.dtype == second.dtype == torch.bool:
        return first & second
    one, two = as_bias(first, hidden), as_bias(second, hidden)
    assert one is not None and two is not None
    return (one + two).clamp_min(torch.finfo(hidden.dtype).min)


def as_bias(mask: Tensor | None, hidden: Tensor) -> Tensor | None:
    """A mask as what is added to logits, in the dtype of `hidden`."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    lowest = torch.finfo(hidden.dtype).min
    return torch.zeros_like(mask, dtype=hidden.dtype).masked_fill(~mask, lowest)


@dataclass(frozen=True, eq=False)
class Units:
    """The visual tokens of each picture in tokens of the tower.

    cells: int64 (B, V, p), numbers of tokens through all rows (row * T + token), 0 where there is none. there: bool
    (B, V), visual tokens that have patches. counts: of each picture, all its visual tokens; made: those with patches.
    rows: the rows of each picture, in order.
    """

    cells: Tensor
    there: Tensor
    counts: tuple[int, ...]
    made: tuple[int, ...]
    rows: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, tables: Sequence[Tensor], tokens: int, leading: int) -> Units:
        """From int64 (V, p) for each picture, numbers of patches through all rows, -1 where there is none."""
        patches = tokens - leading
        counts = tuple(len(table) for table in tables)
        width = max(table.shape[1] for table in tables)
        padded = torch.full((len(tables), max(counts), width), -1, dtype=torch.int64)
        for picture, table in enumerate(tables):
            padded[picture, : len(table), : table.shape[1]] = table.cpu()
        there = (padded >= 0).any(-1)
        cells = (padded // patches) * tokens + leading + padded % patches
        rows = tuple(tuple(sorted(set((table[table >= 0] // patches).tolist()))) for table in tables)
        return cls(cells.masked_fill(padded < 0, 0), there, counts, tuple(there.sum(1).tolist()), rows)

    @classmethod
    def plain(cls, rows: int, tokens: int, leading: int) -> Units:
        """A row is a picture, a patch a visual token."""
        patches = tokens - leading
        return cls.of(list(torch.arange(rows * patches).view(rows, patches, 1)), tokens, leading)

    def to(self, device: torch.device) -> Units:
        """On another device."""
        return replace(self, cells=self.cells.to(device), there=self.there.to(device))

    def gather(self, x: Tensor) -> Tensor:
        """Of (R, T, ...) the patches of each visual token, (B, V, p, ...)."""
        return x.flatten(0, 1)[self.cells.to(x.device)]

    def mean(self, x: Tensor) -> Tensor:
        """Of (R, T, ...) the mean over the patches of each visual token, (B, V, ...); zeros where there are none."""
        found = self.gather(x).mean(2)
        there = self.there.to(x.device).view(*self.there.shape, *[1] * (found.ndim - 2))
        return found.masked_fill(~there, 0)

    def put(self, values: Tensor, chosen: Tensor, into: Tensor) -> Tensor:
        """(R, T, ...) with `values` (B, V, p, ...) in the places of the chosen visual tokens, bool (B, V)."""
        flat = into.flatten(0, 1)
        where = chosen.to(into.device)
        return flat.index_put((self.cells.to(into.device)[where],), values[where].to(into.dtype)).view_as(into)
