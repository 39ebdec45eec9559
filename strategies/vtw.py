"""VTW, Visual Tokens Withdrawal (https://arxiv.org/abs/2405.05803): deep layers no longer need visual tokens.

Rule: lzhxmu/VTW@a3d8cfc with `keep` positions; the paper's K is 15 of 32 layers, hence the default of half the depth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from prunekit import Site, Sites, hookimpl

if TYPE_CHECKING:
    from torch import Tensor


def _half(layers: int) -> Site:
    return Site(layers // 2)


@dataclass(frozen=True)
class VTW:
    """Drop every visual token before decoder layer `at`."""

    sites = Sites(default=_half, encoder=False)
    takes_keep = False
    drops_all = True

    @hookimpl
    def select_tokens(self, valid: Tensor) -> Tensor:
        """Keep nothing: bool (B, V), all False."""
        return valid & False
