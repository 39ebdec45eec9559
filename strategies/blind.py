"""Baseline: no visual tokens at all. What it still answers, the question alone gives away."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prunekit import hookimpl, strategy

if TYPE_CHECKING:
    from torch import Tensor


@strategy(group="baselines", keep="refused", drops_all=True)
class Blind:
    """Drop every visual token at the decoder input."""

    @hookimpl
    def select_tokens(self, valid: Tensor) -> Tensor:
        """Keep nothing: bool (B, V), all False."""
        return valid & False
