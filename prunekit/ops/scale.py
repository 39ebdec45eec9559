"""Putting scores and features on a common scale, always within one row."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize


def precise(values: Tensor) -> Tensor:
    """float32 in place of half precision, for sums and products of many terms."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def cosine(features: Tensor, others: Tensor | None = None) -> Tensor:
    """Cosine of each feature with each of the others: float (B, V, R), float32 for half precision.

    features: float (B, V, H). others: float (B, R, H); None: the features themselves, which gives (B, V, V). A vector
    of zeros has cosine 0 with everything.
    """
    directions = normalize(precise(features), dim=-1)
    targets = directions if others is None else normalize(precise(others), dim=-1)
    return directions @ targets.transpose(-1, -2)


def min_max(scores: Tensor, valid: Tensor | None = None) -> Tensor:
    """Scores scaled to [0, 1] within each row: float (B, V), float32 for half precision.

    scores: float (B, V). valid: bool (B, V); padding gets 0. A row whose finite scores are all equal gets 0 throughout.
    NaN and -inf give 0, +inf gives 1, none of them changes the scale.
    """
    scores = precise(scores)
    finite = scores.isfinite() if valid is None else scores.isfinite() & valid
    low = scores.masked_fill(~finite, torch.inf).amin(-1, keepdim=True)
    high = scores.masked_fill(~finite, -torch.inf).amax(-1, keepdim=True)
    scaled = ((scores - low) / (high - low)).nan_to_num(nan=0.0).clamp(0.0, 1.0)
    return scaled if valid is None else scaled.masked_fill(~valid, 0.0)
