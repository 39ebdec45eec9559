"""Which logical token sits in which physical slot, per row: pure tensors.

Logical: the complete prompt as transformers sees it, with padding. Physical: the tokens that a layer really computes.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

REMEMBERED = 7


@dataclass(frozen=True, eq=False)
class Layout:
    """The physical tokens of every row, in ascending logical order.

    In the decoder rows are right-aligned, as caches and masks count from the end; in the vision tower left-aligned, as
    its CLS token stands first.

    index: int64 (B, K), the logical position of each slot. valid: bool (B, K), False on the filling of shorter rows;
    None when all rows are full. length: S, the logical length. `None` in place of a layout means: all tokens.
    sizes: float (B, K), how many tokens each slot stands for; None: one each.
    shift: int64 (B,), by how much rotary positions after the prompt move down; None: they stay.
    """

    index: Tensor
    valid: Tensor | None
    length: int
    sizes: Tensor | None = None
    shift: Tensor | None = None
    # Newest results of `select`: the KV layers that share a layout are reordered one by one with the same index tensor,
    # and must go on sharing, so that masks are gathered once a step and not once a layer.
    _selected: list[tuple[Tensor, Layout]] = field(default_factory=list, repr=False)

    @property
    def width(self) -> int:
        """K, physical slots of a row."""
        return self.index.shape[1]

    @cached_property
    def plain(self) -> bool:
        """Every row is full, every slot stands for one token, and positions stay as they were."""
        return self.valid is None and self.sizes is None and self.shift is None

    @property
    def present(self) -> Tensor:
        """`valid`, with None made explicit."""
        return torch.ones_like(self.index, dtype=torch.bool) if self.valid is None else self.valid

    def gather(self, x: Tensor, dim: int = 1) -> Tensor:
        """The slots' entries of logical `x`, whose `dim` has length S; its batch may be 1 or B."""
        return take(x, self.index, dim)

    def expand(self, x: Tensor) -> Tensor:
        """Physical (B, K, H) to logical (B, S, H). A hole shows its nearest kept predecessor, else the first slot."""
        present = torch.zeros(x.shape[0], self.length, dtype=torch.int64, device=x.device)
        present.scatter_add_(1, self.index.to(x.device), self.present.to(x.device, torch.int64))
        rank = present.cumsum(1)
        first = self.width - rank[:, -1:]
        return take(x, (first + rank - 1).clamp_min_(0).clamp_max_(self.width - 1), 1)

    def put(self, x: Tensor, into: Tensor) -> Tensor:
        """Logical `into` (B, S, ...) with physical `x` (B, K, ...) at the positions of its slots."""
        index = self.index.to(x.device)
        if self.valid is not None:  # a filling stands for a dropped token, whose entry keeps what it had
            x = torch.where(per_token(self.valid.to(x.device), x), x, take(into, index, 1))
        return into.scatter(1, per_token(index, x).expand_as(x), x)

    def slot_of(self) -> Tensor:
        """For each logical position the slot that holds it, int64 (B, S); meaningless for those that none holds."""
        slots = torch.zeros(self.index.shape[0], self.length, dtype=torch.int64, device=self.index.device)
        return slots.scatter_(1, self.index, torch.arange(self.width, device=self.index.device).expand_as(self.index))

    def select(self, rows: Tensor) -> Layout:
        """The layout of batch rows `rows`, int64 (B',)."""
        for earlier, layout in self._selected:
            if earlier is rows:
                return layout
        local = rows.to(self.index.device)
        parts = (part if part is None else part[local] for part in (self.valid, self.sizes, self.shift))
        valid, sizes, shift = parts
        selected = Layout(self.index[local], valid, self.length, sizes, shift)
        # As many as one layer has groups of rows; beams bring a new index every step.
        self._selected[:] = [*self._selected[-REMEMBERED:], (rows, selected)]
        return selected

    def narrow(self, keep: Tensor, lengths: list[int]) -> tuple[Layout, Tensor]:
        """Drop slots: keep is bool (B, K), lengths the number of True in each row (known to the host: no sync).

        Returns the new layout, without a shift, and the old slots that it took, int64 (B, K').
        """
        slots = rightmost(keep, max(lengths))
        ragged = min(lengths) != max(lengths)
        valid = keep.gather(1, slots) if ragged else None
        sizes = None if self.sizes is None else self.sizes.gather(1, slots)
        return Layout(self.index.gather(1, slots), valid, self.length, sizes), slots

    def last(self, slots: int) -> Layout:
        """The last so many slots."""
        parts = (part if part is None else part[:, -slots:] for part in (self.valid, self.sizes))
        valid, sizes = parts
        return Layout(self.index[:, -slots:], valid, self.length, sizes, self.shift)

    def with_sizes(self, sizes: Tensor) -> Layout:
        """The same slots with sizes, float (B, K)."""
        return replace(self, sizes=sizes, _selected=[])

    def with_shift(self, shift: Tensor | None) -> Layout:
        """The same slots with a shift, int64 (B,)."""
        return replace(self, shift=shift, _selected=[])

    @classmethod
    def full(cls, ids: Tensor) -> Layout:
        """Every token of int64 (B, S) in its own slot."""
        rows, length = ids.shape
        return cls(torch.arange(length, device=ids.device).expand(rows, length), None, length)


def rightmost(mask: Tensor, width: int) -> Tensor:
    """Columns of the True entries of bool (B, K), ascending and right-aligned: int64 (B, width), False ones first."""
    order = mask.to(torch.uint8).argsort(dim=1, stable=True)
    return order[:, mask.shape[1] - width :]


def leftmost(mask: Tensor, width: int) -> Tensor:
    """Columns of the True entries of bool (B, K), ascending and left-aligned: int64 (B, width), False ones last."""
    return (~mask).to(torch.uint8).argsort(dim=1, stable=True)[:, :width]


def per_token(x: Tensor, like: Tensor) -> Tensor:
    """(B, K) with as many axes as `like`, (B, K, ...)."""
    return x.view(*x.shape, *[1] * (like.ndim - 2))


def blank(x: Tensor, valid: Tensor, padding: float = 0.0) -> Tensor:
    """`x`, (B, K, ...), with `padding` where not `valid`, bool (B, K)."""
    return x.masked_fill(~per_token(valid.to(x.device), x), padding)


def take(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """Gather along `dim` with a per-row index (B, K); x has shape (1 or B, ...)."""
    index = index.to(x.device)
    x = x.expand(index.shape[0], *x.shape[1:]) if x.shape[0] != index.shape[0] else x
    shape = [1] * x.ndim
    shape[0], shape[dim] = index.shape
    target = list(x.shape)
    target[dim] = index.shape[1]
    return x.gather(dim, index.view(shape).expand(target))


def select_rows(x: Tensor, rows: Tensor | None, batch: int = 0) -> Tensor:
    """Rows of `x` along its dimension `batch`, which may have length 1 for all; None: all."""
    if rows is None or x.shape[batch] == 1:
        return x
    return x.index_select(batch, rows.to(x.device))
