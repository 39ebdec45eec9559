"""Greedy MAP inference of a determinantal point process (DPP): choose tokens that together span the largest volume."""

from __future__ import annotations

import torch
from torch import Tensor

from prunekit.ops.greedy import GreedyCount, choose, column_at, row_at, steps_of
from prunekit.ops.scale import precise


@torch.no_grad()
def dpp(kernel: Tensor, count: GreedyCount, relevance: Tensor | None = None, valid: Tensor | None = None) -> Tensor:
    """Indices in the order of choice: int64 (B, T), T the largest count; -1 where a row has no more to choose.

    kernel: float (B, V, V), positive semi-definite, for example cosines. relevance: float (B, V), not negative; entry
    (i, j) becomes relevance_i * kernel_ij * relevance_j; None: the kernel as it is. Always the token is taken that
    multiplies the determinant of the chosen part of the kernel most. Ties: lower index.
    That factor is the part of the token's own entry on the diagonal that the chosen tokens do not explain. Below
    eps ** 0.75 of the entry (6e-6 in float32) it counts as 0, since rounding grows where chosen tokens are nearly
    dependent. Half precision is computed in float32. O(V T^2) time, O(V (V + T)) memory.

    Source: Chen, Zhang, Zhou 2018 (https://arxiv.org/abs/1709.05135), algorithm 1, which updates one row of the
    Cholesky factor a step; with relevance: CDPruner (https://arxiv.org/abs/2506.10967, Theia-4869/CDPruner@9541616).
    """
    kernel = precise(kernel).nan_to_num(nan=0.0)
    if relevance is not None:
        relevance = relevance.to(kernel.dtype)
        kernel = relevance.unsqueeze(-1) * kernel * relevance.unsqueeze(-2)
    diagonal = kernel.diagonal(dim1=-2, dim2=-1)
    negligible = diagonal.abs() * torch.finfo(kernel.dtype).eps ** 0.75
    residual = diagonal.masked_fill(diagonal <= negligible, 0.0)
    # One row for each step, orthogonal to the rows before: their squares add up to what is explained.
    factor = kernel.new_zeros(*kernel.shape[:-2], steps_of(count, kernel.shape[-1]), kernel.shape[-1])
    step = 0

    def after(pick: Tensor) -> Tensor:
        nonlocal residual, step
        rows = factor[..., :step, :]
        explained = (column_at(rows, pick).unsqueeze(-2) @ rows).squeeze(-2)
        scale = residual.gather(-1, pick)
        new = torch.where(scale > 0, (row_at(kernel, pick) - explained) / scale.sqrt(), 0.0)
        factor[..., step, :] = new
        step += 1
        residual = residual - new.square()
        residual = residual.masked_fill(residual <= negligible, 0.0)
        return residual

    return choose(residual, after, count, valid)
