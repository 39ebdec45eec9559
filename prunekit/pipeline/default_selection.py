"""What a token stage does when its strategy only scores."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from prunekit.hookspecs import hookimpl
from prunekit.ops import top_k_mask


class DefaultSelection:
    """Keep the highest scores; registered in the token stages whose strategy does not select by itself."""

    @hookimpl
    def select_tokens(self, scores: Tensor, count: Sequence[int], valid: Tensor) -> Tensor:
        """Stable top-k, lower index first on ties."""
        return top_k_mask(scores, count, valid)
