"""FastV (https://arxiv.org/abs/2403.06764): an image is worth half the tokens after layer 2.

Rule: pkunlp-icler/FastV@d165972.
"""

from torch import Tensor

from prunekit import Rows, Site, Sites, hookimpl, strategy


@strategy(
    sites=Sites(default=Site(2), encoder=False, lowest=1),
    inputs={"attention": Rows(layer="previous", queries="last", heads="mean")},
)
class FastV:
    """Keep the visual tokens that the last prompt token attends to most in the layer before `at`."""

    @hookimpl
    def score_tokens(self, attention: Tensor) -> Tensor:
        """The attention itself, (B, V)."""
        return attention
