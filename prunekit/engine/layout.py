"""Which logical token sits in which physical slot, per row: pure tensors.

Logical: the complete prompt as transformers sees it, with padding. Physical: the tokens that a layer really computes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Layout:
    """The physical tokens of every row, right-aligned and in ascending logical order.

    index: int64 (B, K), the logical position of each slot. valid: bool (B, K), False on the filling of shorter rows;
    None when all rows are full. length: S, the logical length. `None` in place of a layout means: all tokens.
    """

    index: Tensor
    valid: Tensor | None
    length: int
    # The newest `select`: the KV layers that share a layout are reordered one by one with the same index tensor, and
    # must go on sharing, so that masks are gathered once a step and not once a layer.
    _selected: list[tuple[Tensor, Layout]] = field(default_factory=list, repr=False)

    @property
    def width(self) -> int:
        """K, physical slots of a row."""
        return self.index.shape[1]

    def gather(self, x: Tensor, dim: int = 1) -> Tensor:
        """The slots' entries of logical `x`, whose `dim` has length S; its batch may be 1 or B."""
        return _take(x, self.index, dim)

    def expand(self, x: Tensor) -> Tensor:
        """Physical (B, K, H) to logical (B, S, H). A hole shows its nearest kept predecessor, else the first slot."""
        present = torch.zeros(x.shape[0], self.length, dtype=torch.int64, device=x.device)
        valid = torch.ones_like(self.index, dtype=torch.bool) if self.valid is None else self.valid
        present.scatter_add_(1, self.index.to(x.device), valid.to(x.device, torch.int64))
        rank = present.cumsum(1)
        first = self.width - rank[:, -1:]
        return _take(x, (first + rank - 1).clamp_min_(0).clamp_max_(self.width - 1), 1)

    def select(self, rows: Tensor) -> Layout:
        """The layout of batch rows `rows`, int64 (B',)."""
        if not self._selected or self._selected[0][0] is not rows:
            local = rows.to(self.index.device)
            valid = None if self.valid is None else self.valid[local]
            self._selected[:] = [(rows, Layout(self.index[local], valid, self.length))]
        return self._selected[0][1]

    def narrow(self, keep: Tensor, lengths: list[int]) -> tuple[Layout, Tensor]:
        """Drop slots: keep is bool (B, K), lengths the number of True in each row (known to the host: no sync).

        Returns the new layout and the old slots that it took, int64 (B, K').
        """
        slots = rightmost(keep, max(lengths))
        ragged = min(lengths) != max(lengths)
        valid = keep.gather(1, slots) if ragged else None
        return Layout(self.index.gather(1, slots), valid, self.length), slots

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


def _take(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """Gather along `dim` with a per-row index (B, K); x has shape (1 or B, ...)."""
    index = index.to(x.device)
    x = x.expand(index.shape[0], *x.shape[1:]) if x.shape[0] != index.shape[0] else x
    shape = [1] * x.ndim
    shape[0], shape[dim] = index.shape
    target = list(x.shape)
    target[dim] = index.shape[1]
    return x.gather(dim, index.view(shape).expand(target))
