"""FasterVLM (https://arxiv.org/abs/2412.01818v1): what the CLS token of the vision tower attends to.

Rule, for each crop or frame with T tokens to keep: the T largest mean_h A[h, CLS, i], A the attention of the tower
block whose output the projector gets, softmax over CLS and all patches.

Studied: Theia-4869/FasterVLM@f5d5f12. Deviations: `keep` is of a sample and is shared between its crops in proportion
to their tokens, where the authors keep as many of each; their setting for tiles has no newlines and no unpadding, here
tiles are those of the model, and newlines go first.
"""

from __future__ import annotations

from torch import Tensor

from prunekit import ModelShape, Sites, hookimpl, strategy
from prunekit.ops import crop_quotas, group_top_k


@strategy(paper="2412.01818", code="Theia-4869/FasterVLM@f5d5f12", sites=Sites(tower=True), per_sample=True)
class FasterVLM:
    """Keep what the CLS token attends to most, in each crop its share."""

    @hookimpl
    def select_tokens(self, encoder_attention: Tensor, coords: Tensor, frames: Tensor, count: int) -> Tensor:
        """Bool (V,) with exactly `count` True."""
        groups, quota = crop_quotas(coords, frames, count)
        return group_top_k(encoder_attention, groups, quota)

    @hookimpl
    def flops(self, shape: ModelShape, text: int, visual: int) -> int:
        """One row of attention."""
        return 2 * visual * (shape.tower.width if shape.tower else 0)
