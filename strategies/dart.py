"""DART (https://arxiv.org/abs/2502.11494, EMNLP 2025): duplication matters more than importance.

Pivots are the visual tokens, and the text tokens behind the image, with the largest |k|_1 in layer K - 1. For each
pivot p in turn, the visual tokens not yet kept with the least cos(norm(h_i), norm(h_p)) are kept, equally many for each
pivot; norm is the model's final one.

Rule: DART as vendored in Chenfei-Liao/VTC-Bench@983e443. Deviations: pivots take their turns in the order of the
prompt, the authors' in that of a Python set of ints (up to 5 of 132 tokens differ); of T tokens the authors keep 4 + 8
floor(T / 8), this one exactly `count`, the first pivots taking one more where it does not divide: `keep_tokens: 132` is
their 128.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from prunekit import ModelShape, Site, Sites, hookimpl, strategy
from prunekit.ops import cosine, precise, top_k_mask


@strategy(
    paper="2502.11494",
    code="Chenfei-Liao/VTC-Bench@983e443",
    sites=Sites(default=Site(2), encoder=False, lowest=1),
    per_sample=True,
)
class DART:
    """Keep pivots with large keys, and for each of them the visual tokens that resemble it least.

    image_pivots, text_pivots: how many, at most.
    """

    image_pivots: int = 4
    text_pivots: int = 4

    def __post_init__(self) -> None:
        if self.image_pivots < 1:
            raise ValueError("image_pivots: is at least 1")
        if self.text_pivots < 0:
            raise ValueError("text_pivots: is at least 0")

    @hookimpl
    def select_tokens(
        self,
        keys: Tensor,
        text_keys: Tensor,
        hidden: Tensor,
        text_hidden: Tensor,
        text_after: Tensor,
        norm: Callable[[Tensor], Tensor],
        count: int,
    ) -> Tensor:
        """Bool (V,) from keys (V, D) and (T, D), states (V, H) and (T, H), and bool (T,), the text behind the image."""
        keep = top_k_mask(_size(keys), min(self.image_pivots, count))
        words = top_k_mask(_size(text_keys), self.text_pivots, text_after)
        pivots = torch.cat([hidden[keep], text_hidden[words]])
        alike = cosine(norm(pivots), norm(hidden))
        share, more = divmod(count - min(self.image_pivots, count), len(pivots))
        for turn, row in enumerate(alike):
            keep = keep | top_k_mask(-row, share + (turn < more), ~keep)
        return keep

    @hookimpl
    def flops(self, shape: ModelShape, text: int, visual: int) -> int:
        """Norms of states, and the cosines of all pivots with all visual tokens."""
        pivots = self.image_pivots + self.text_pivots
        return 4 * visual * shape.hidden + 2 * pivots * visual * shape.hidden


def _size(keys: Tensor) -> Tensor:
    """The L1 norm of each key, all heads together: (V,)."""
    return precise(keys).abs().sum(-1)
