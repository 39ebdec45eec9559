"""Arithmetic in float64 all the way, so that equality can be checked to 1e-9 instead of 1e-7."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_WRITES = (Tensor.__setitem__, Tensor.index_add_, Tensor.index_copy_, Tensor.scatter_, Tensor.masked_scatter_)
_PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, functional.grid_sample)


class Float64Throughout(TorchFunctionMode):
    """While this is on, no float64 tensor is rounded to float32: `with Float64Throughout(): ...`.

    A model in float64 still rounds at a few points, because its code casts to float32 for the sake of half precision:
    RMSNorm, the softmax of eager attention, and the logits that `generate` collects. Each of them costs an error of
    about 1e-7, in which a real mistake could hide. This mode turns `x.to(float32)`, `x.type(float32)`, `x.float()` and
    `softmax(x, dtype=float32)` of a float64 `x` into the same without rounding; a float64 matrix times a float32 one
    (older rotary embeddings multiply frequencies by whole positions, poolers states by counts) is a float64 product,
    and float64 images are sampled at float64 coordinates. What is written into a float32 buffer that the code made is
    rounded, as it would be in any dtype. Nothing on the model is patched, and code under test and reference run under
    the very same rule.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = dict(kwargs or {})
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float:
                return args[0]
            if func in (Tensor.to, Tensor.type):
                args = tuple(torch.float64 if argument is torch.float32 else argument for argument in args)
                if named.get("dtype") is torch.float32:
                    named["dtype"] = torch.float64
            elif func in (functional.softmax, torch.softmax, Tensor.softmax) and named.get("dtype") is torch.float32:
                named["dtype"] = torch.float64
        if func in _PRODUCTS and {torch.float64, torch.float32} == {one.dtype for one in args[:2]}:
            args = (args[0].to(torch.float64), args[1].to(torch.float64), *args[2:])
        elif func in _WRITES and args[0].dtype == torch.float32:
            args = tuple(_rounded(argument) for argument in args)
        return func(*args, **named)


def _rounded(argument: Any) -> Any:
    """A float64 tensor as what it is written into: a buffer that model code made in float32 on purpose."""
    double = isinstance(argument, Tensor) and argument.dtype == torch.float64
    return argument.to(torch.float32) if double else argument
