"""VTW, Visual Tokens Withdrawal (https://arxiv.org/abs/2405.05803): deep layers no longer need visual tokens.

Rule: lzhxmu/VTW@a3d8cfc with `keep` positions; the paper's K is 15 of 32 layers, hence the default of half the depth.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prunekit import Site, Sites, hookimpl, strategy

if TYPE_CHECKING:
    from torch import Tensor


def _half(layers: int) -> Site:
    return Site(layers // 2)


@strategy(sites=Sites(default=_half, encoder=False), keep="refused", drops_all=True)
class VTW:
    """Drop every visual token before decoder layer `at`."""

    @hookimpl
    def select_tokens(self, valid: Tensor) -> Tensor:
        """Keep nothing: bool (B, V), all False."""
        return valid & False
