"""MustDrop (https://arxiv.org/abs/2411.10803): alike neighbours merge in the tower, the unread leave, a key set stays.

`mustdrop_tower`: behind block 0 of the tower, a window of 3 x 3 tokens with a mean pairwise cosine of at least 0.8
becomes its mean. `mustdrop`: with a = mean over heads of the attention of the text behind the image in a layer that has
just run, a token leaves if sum_t a_ti < 0.001 sum_tj a_tj and max_t a_ti < 0.001, unless it is in the key set: of each
crop the ceil(0.08 n) to which CLS attends most in the tower's last block, head mean, chosen at the first site. Layers
2, 6, 10 and 14 (of 32). Decoding sees what is left behind the last site in all layers.

Rule: liuting20/MustDrop@909afa5, which names thresholds for TextVQA: both 0.001 for 192 tokens on average, 0.0012 and
0.001 for 128, 0.011 and 0.01 for 64. Deviations: merged tokens stand in the place of the last of their window, and
positions stay, where theirs come first and are closed up (`positions: renumber`); a window at the border, or thinned
out, is what there is of it; every image merges by itself, where theirs take the least number of windows of a batch; KV
is cropped in layers 0 and 1 as well; layers scale with the depth.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from prunekit import EncoderRows, ModelShape, Owners, Rows, Selection, Site, Sites, hookimpl, strategy
from prunekit.ops import crop_quotas, group_members, precise, top_k_mask

LAYERS = (2, 6, 10, 14)  # of 32


@strategy(
    paper="2411.10803",
    code="liuting20/MustDrop@909afa5",
    sites=Sites(default=Site(0, "vision", "after"), tower=True, encoder=False, decoder=False),
    keep="refused",
    per_sample=True,
)
class MustDropTower:
    """Inside the tower, merge windows of tokens that are alike.

    window: tokens of a side. alike: the least mean pairwise cosine of one that merges.
    """

    window: int = 3
    alike: float = 0.8

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError("window: is at least 1")

    @hookimpl
    def select_tokens(self, hidden: Tensor, coords: Tensor, frames: Tensor) -> Selection:
        """Bool (V,) and owners from states, float (V, W)."""
        cell = torch.stack([frames, coords[:, 1] // self.window, coords[:, 2] // self.window], dim=-1)
        group = torch.unique(cell, dim=0, return_inverse=True)[1]
        unit = normalize(precise(hidden), dim=-1)
        number = torch.zeros_like(unit[:, 0]).index_add(0, group, torch.ones_like(unit[:, 0]))
        # The sum of all cosines of a group is the square of the sum of its unit vectors.
        every = torch.zeros_like(unit).index_add(0, group, unit).square().sum(-1)
        own = torch.zeros_like(number).index_add(0, group, unit.square().sum(-1))
        merges = (number > 1) & (every - own >= self.alike * number * (number - 1))
        place = torch.arange(len(group), device=group.device)
        last = torch.zeros_like(place).scatter_reduce(0, group, place, "amax")
        owner = torch.where(merges[group], last[group], place)
        return Selection(owner == place, Owners(owner))

    @hookimpl
    def flops(self, shape: ModelShape, text: int, visual: int) -> int:
        """Unit vectors and their sums."""
        return 8 * visual * (shape.tower.width if shape.tower else 0)


@strategy(
    paper="2411.10803",
    code="liuting20/MustDrop@909afa5",
    sites=Sites(encoder=False, points=("after",)),
    inputs=lambda self: {
        "attention": tuple(Rows(layer="own", queries="after", over=over) for over in ("sum", "max")),
        "encoder_attention": EncoderRows(layer=-1, query=self.query),
    },
    keep="refused",
    schedule=lambda self, layers: {Site((layers * at + 16) // 32, "layer", "after"): None for at in LAYERS},
    per_sample=True,
    crops=True,
)
class MustDrop:
    """Drop what no word of the question attends to, alone or together, but what matters to the tower.

    together: the least share of all attention to visual tokens. alone: the least attention of one word. key: the part
    of each crop that stays whatever the question. query: who chooses it, `cls`; or `mean`, all tokens of the tower's
    last block, for towers without CLS.
    """

    together: float = 0.001
    alone: float = 0.001
    key: float = 0.08
    query: Literal["cls", "mean"] = "cls"

    def __post_init__(self) -> None:
        if not 0 < self.key <= 1:
            raise ValueError("key: is a part, above 0 and at most 1")

    @hookimpl
    def select_tokens(
        self,
        attention: tuple[Tensor, Tensor],
        encoder_attention: Tensor,
        coords: Tensor,
        frames: Tensor,
        index: Tensor,
        state: dict[str, Any],
    ) -> Selection:
        """Bool (V,) from sums and maxima over words, float (V,) each, and what the tower attends to, float (V,)."""
        if "key" not in state:
            state["key"] = index[self._key(encoder_attention, coords, frames)]
        total, most = map(precise, attention)
        read = (total >= self.together * total.sum()) | (most >= self.alone)
        return Selection(read | torch.isin(index, state["key"]), crop=True)

    def _key(self, received: Tensor, coords: Tensor, frames: Tensor) -> Tensor:
        """The key set, bool (V,)."""
        groups, quota = crop_quotas(coords, frames, len(coords))
        chosen = torch.zeros_like(groups, dtype=torch.bool)
        for tokens in group_members(groups, len(quota)):
            if len(tokens) and coords[tokens[0], 1] >= 0:
                chosen[tokens] = top_k_mask(received[tokens], math.ceil(self.key * len(tokens) - 1e-9))
        return chosen

    @hookimpl
    def flops(self, shape: ModelShape, text: int, visual: int) -> int:
        """The rows of at most all text, twice, and one row of the tower for each crop."""
        return 2 * shape.row_flops(text, text + visual) + 2 * visual * (shape.tower.width if shape.tower else 0)
