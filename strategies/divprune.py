"""DivPrune (https://arxiv.org/abs/2503.02175): keep the subset of visual tokens that is most diverse.

Rule: vbdi/divprune@799e2d9, max-min over cosine distance of the projected features. The authors round the count half
to even, prunekit half up, as for every strategy.
"""

import torch
from torch import Tensor

from prunekit import ModelShape, hookimpl, strategy
from prunekit.ops import cosine, max_min


@strategy(paper="2503.02175", code="vbdi/divprune@799e2d9", per_sample=True)
class DivPrune:
    """Repeatedly keep the token that is farthest from all kept ones."""

    @hookimpl
    def select_tokens(self, hidden: Tensor, count: int) -> Tensor:
        """Bool (V,) from the tokens' states, float (V, H)."""
        chosen = max_min(1 - cosine(hidden), count)
        return torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device).index_fill(0, chosen, True)

    @hookimpl
    def flops(self, shape: ModelShape, text: int, visual: int) -> int:
        """The cosines of all pairs."""
        return 2 * visual**2 * shape.hidden
