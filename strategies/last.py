"""Baseline: the last visual tokens of each sample; of one image its lower part, which rotary attention favours too."""

from __future__ import annotations

from torch import Tensor

from prunekit import hookimpl, strategy


@strategy(group="baselines")
class Last:
    """Keep the visual tokens that stand last in the prompt, in raster order."""

    @hookimpl
    def score_tokens(self, index: Tensor) -> Tensor:
        """float (B, V): the later, the higher."""
        return index.double()
