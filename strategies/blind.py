"""Baseline: no visual tokens at all. What it still answers, the question alone gives away."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from prunekit import Sites, hookimpl

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Blind:
    """Drop every visual token at the decoder's door."""

    sites = Sites()
    takes_keep = False
    drops_all = True

    @hookimpl
    def select_tokens(self, valid: Tensor) -> Tensor:
        """Keep nothing: bool (B, V), all False."""
        return valid & False
