"""Baseline: the first visual tokens of each sample; of one image its upper part."""

from __future__ import annotations

from torch import Tensor

from prunekit import hookimpl, strategy


@strategy(group="baselines")
class First:
    """Keep the visual tokens that stand first in the prompt, in raster order."""

    @hookimpl
    def score_tokens(self, index: Tensor) -> Tensor:
        """float (B, V): the earlier, the higher."""
        return -index.double()
