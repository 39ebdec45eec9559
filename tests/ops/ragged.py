"""Batches of rows of different lengths, with padding anywhere, and the check of a primitive against its naive twin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st
from torch import Tensor

DTYPES = (torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Ragged:
    """positions: for each row where its tokens stand among `width` slots; the others are padding."""

    width: int
    positions: tuple[tuple[int, ...], ...]

    @property
    def valid(self) -> Tensor:
        return torch.tensor([[i in row for i in range(self.width)] for row in self.positions])

    @property
    def lengths(self) -> list[int]:
        return [len(row) for row in self.positions]

    def vector(self, rows: Sequence[Sequence[float]], padding: float, dtype: torch.dtype) -> Tensor:
        """(B, V)"""
        full = torch.full((len(rows), self.width), padding, dtype=dtype)
        for i, (at, row) in enumerate(zip(self.positions, rows, strict=True)):
            full[i, list(at)] = torch.tensor(row, dtype=dtype)
        return full

    def matrix(self, rows: Sequence[Sequence[Sequence[float]]], padding: float, dtype: torch.dtype) -> Tensor:
        """(B, V, V)"""
        full = torch.full((len(rows), self.width, self.width), padding, dtype=dtype)
        for i, (at, row) in enumerate(zip(self.positions, rows, strict=True)):
            if at:
                index = torch.tensor(at)
                full[i, index[:, None], index[None, :]] = torch.tensor(row, dtype=dtype)
        return full


@st.composite
def ragged(draw: st.DrawFn, tokens: int = 8, rows: int = 3) -> Ragged:
    """Up to `rows` rows of up to `tokens` tokens; rows may be empty or full."""
    width = draw(st.integers(1, tokens))
    slots = st.sets(st.integers(0, width - 1)).map(lambda at: tuple(sorted(at)))
    return Ragged(width, tuple(draw(st.lists(slots, min_size=1, max_size=rows))))


def integers(shape: tuple[int, ...], low: int, high: int, seed: int) -> Tensor:
    """Whole numbers, so that ties are frequent and every dtype is exact."""
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(seed))


def symmetric(size: int, low: int, high: int, seed: int, diagonal: int | None = None) -> list[list[int]]:
    half = integers((size, size), low, high, seed).tril()
    whole = half + half.tril(-1).T
    return (whole if diagonal is None else whole.fill_diagonal_(diagonal)).tolist()


seeds = st.integers(0, 10_000)


def scores_of(batch: Ragged, seed: int, low: int = -3, high: int = 3) -> list[list[int]]:
    return [integers((n,), low, high, seed + i).tolist() for i, n in enumerate(batch.lengths)]


def matrices_of(
    batch: Ragged, seed: int, low: int = -3, high: int = 3, diagonal: int | None = None
) -> list[list[list[int]]]:
    return [symmetric(n, low, high, seed + 100 + i, diagonal) for i, n in enumerate(batch.lengths)]


def counts_of(batch: Ragged, seed: int) -> list[int]:
    """From none to more than there are."""
    return integers((len(batch.lengths),), 0, batch.width + 1, seed + 200).tolist()


@dataclass(frozen=True)
class Case:
    """Inputs of one primitive for a batch: of each name one list for each row."""

    batch: Ragged
    vectors: dict[str, list[list[float]]] = field(default_factory=dict)
    masks: dict[str, list[list[int]]] = field(default_factory=dict)
    matrices: dict[str, list[list[list[float]]]] = field(default_factory=dict)
    numbers: dict[str, list[int]] = field(default_factory=dict)
    options: dict[str, object] = field(default_factory=dict)

    def padded(self, dtype: torch.dtype, padding: float) -> dict[str, object]:
        vectors = {name: self.batch.vector(rows, padding, dtype) for name, rows in self.vectors.items()}
        masks = {name: self.batch.vector(rows, 1, torch.bool) for name, rows in self.masks.items()}
        matrices = {name: self.batch.matrix(rows, padding, dtype) for name, rows in self.matrices.items()}
        return {**vectors, **masks, **matrices, **self.numbers, **self.options, "valid": self.batch.valid}

    def alone(self, row: int, dtype: torch.dtype) -> dict[str, object]:
        """One row without a batch axis and without padding."""
        inputs = self.naive(row)
        for name in (*self.vectors, *self.matrices):
            inputs[name] = torch.tensor(inputs[name], dtype=dtype)
        for name in self.masks:
            inputs[name] = torch.tensor(inputs[name], dtype=torch.bool)
        return inputs

    def naive(self, row: int) -> dict[str, object]:
        tables = {**self.vectors, **self.masks, **self.matrices, **self.numbers}
        return {**{name: rows[row] for name, rows in tables.items()}, **self.options}


def check(op: Callable[..., Tensor], twin: Callable[..., list], case: Case, result: str, dtypes=DTYPES) -> None:
    """The padded batch, each row alone and the naive twin agree, in every dtype and whatever the padding holds.

    result: "mask" (bool for each token), "order" (indices) or "owner" (an index for each token).
    """
    expected = [twin(**case.naive(row)) for row in range(len(case.batch.positions))]
    for dtype in dtypes:
        for padding in (7.0, torch.nan):
            got = op(**case.padded(dtype, padding))
            assert got.dtype == (torch.bool if result == "mask" else torch.int64)
            rows = zip(got.tolist(), case.batch.positions, strict=True)
            assert [without_padding(row, at, result) for row, at in rows] == expected
        for row, length in enumerate(case.batch.lengths):
            if length:
                assert op(**case.alone(row, dtype)).tolist() == expected[row]


def without_padding(row: list[int], at: tuple[int, ...], result: str) -> list[int]:
    """One row of a result among its tokens instead of its slots; what it says of padding is checked."""
    if result == "order":
        chosen = [at.index(slot) for slot in row if slot != -1]
        assert row[len(chosen) :] == [-1] * (len(row) - len(chosen))
        return chosen
    nothing = False if result == "mask" else -1
    assert all(row[slot] == nothing for slot in range(len(row)) if slot not in at)
    return [row[slot] if result == "mask" or row[slot] == -1 else at.index(row[slot]) for slot in at]
