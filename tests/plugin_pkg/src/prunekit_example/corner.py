"""Baseline: keep the tokens nearest to one corner of the picture."""

from typing import Literal

from torch import Tensor

from prunekit import hookimpl, strategy


@strategy()
class Corner:
    """A score that falls with the distance, in rows plus columns, from a corner of the token's image."""

    corner: Literal["top-left", "bottom-right"] = "top-left"

    @hookimpl
    def score_tokens(self, coords: Tensor) -> Tensor:
        """Float (B, V)."""
        _, row, column, rows, columns = coords.unbind(-1)
        if self.corner == "top-left":
            return -(row + column).float()
        return -(rows - 1 - row + columns - 1 - column).float()
