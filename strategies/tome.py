"""ToMe (https://arxiv.org/abs/2210.09461): in every block of the tower the most similar pairs of tokens merge.

Rule: facebookresearch/ToMe@af95e4b. Between attention and MLP of a block: tokens are split alternately into A and B, as
they stand in line with CLS in front; each of A proposes the one of B whose keys, the mean over heads, have the largest
cosine with its own; the r strongest proposals merge by the mean weighted by sizes. The line is then what is left of A,
then B. Attention adds log(size) to the logits of a key. CLS never merges, at most half of the tokens go.
Deviations: r follows from the budget, in equal parts over the blocks, as ToMe has no setting for LVLMs; merged tokens
stand in the place of the one of B. Crops merge by themselves, each to its share of the count; where more than half of
one has to go, matching is repeated in the block with keys that merged alike, and a crop without a share is dropped.
Towers without CLS are split as with one; the authors then also sort the rest of A by similarity. A visual token that is
several patches merges as a whole. Sizes end with the tower.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from prunekit import EncoderKeys, ModelShape, Owners, Selection, Site, Sites, hookimpl, strategy
from prunekit.ops import bipartite_matching, cosine, crop_quotas, precise


def _every_block(self: ToMe, layers: int, blocks: int) -> Mapping[Site, float]:
    """Two thirds merge, in equal parts."""
    return {Site(block, "vision", "mid"): 1 - 2 / 3 * (block + 1) / blocks for block in range(blocks)}


@strategy(
    paper="2210.09461",
    code="facebookresearch/ToMe@af95e4b",
    sites=Sites(default=Site(0, "vision", "mid"), tower=True, encoder=False, decoder=False),
    inputs={"encoder_keys": EncoderKeys()},
    schedule=_every_block,
    spread=True,
    per_sample=True,
)
class ToMe:
    """Inside the tower, merge the tokens with the most similar keys, in every block; a third is left.

    proportional: tokens count in attention for as many as they stand for; towers that take no masks need false.
    """

    proportional: bool = True

    @hookimpl
    def select_tokens(
        self,
        encoder_keys: Tensor,
        sizes: Tensor,
        coords: Tensor,
        frames: Tensor,
        index: Tensor,
        state: dict[str, Any],
        count: int,
    ) -> Selection:
        """Bool (V,), who joins whom, and sizes, float (V,), from keys, float (V, D)."""
        line, sizes = self._line(index, precise(sizes), state)
        keys, owner = precise(encoder_keys), torch.arange(len(index), device=index.device)
        groups, quota = crop_quotas(coords, frames, count)
        lines = [
            self._merged(line[groups[line] == crop], keys, sizes, owner, wanted)
            for crop, wanted in enumerate(quota.tolist())
        ]
        state["line"] = index[torch.cat(lines)]
        keep = owner == torch.arange(len(index), device=index.device)
        totals = torch.zeros_like(sizes).index_add(0, owner.clamp(min=0), sizes.masked_fill(owner < 0, 0.0))
        state["sizes"] = index, totals
        amounts = torch.where(owner < 0, 0.0, sizes / totals[owner.clamp(min=0)])
        sized = torch.where(keep, totals, 1.0) if self.proportional else None
        return Selection(keep, Owners(owner, "sum", amounts), sized)

    def _line(self, index: Tensor, sizes: Tensor, state: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The tokens in their order of the last block, int64 (V,), and their sizes; others may have left since."""
        if not state:
            return torch.arange(len(index), device=index.device), sizes
        line = torch.searchsorted(index, state["line"][torch.isin(state["line"], index)])
        before, totals = state["sizes"]
        return line, totals[torch.searchsorted(before, index)]

    def _merged(self, line: Tensor, keys: Tensor, sizes: Tensor, owner: Tensor, wanted: int) -> Tensor:
        """One crop's line once `wanted` of it are left. owner: int64 (V,), of all tokens; it is written to."""
        if not wanted:
            owner[line] = -1
            return line[:0]
        keys, sizes = keys[line], sizes[line]
        while len(line) > wanted:
            places = torch.arange(len(line), device=line.device)
            source = places % 2 == 1  # CLS, in front, is the first of A
            to = bipartite_matching(cosine(keys), min(len(line) - wanted, len(line) // 2), sources=source)
            joined = line[to]
            owner[line] = joined
            # Who had joined a token that goes now follows it.
            owner.copy_(torch.where(owner >= 0, owner[owner.clamp(min=0)], owner))
            total = torch.zeros_like(sizes).index_add(0, to, sizes)
            keys = torch.zeros_like(keys).index_add(0, to, keys * sizes[:, None]) / total[:, None]
            left = torch.cat([((to == places) & source).nonzero()[:, 0], (~source).nonzero()[:, 0]])
            line, keys, sizes = line[left], keys[left], total[left]
        return line

    @hookimpl
    def flops(self, shape: ModelShape, text: int, visual: int) -> int:
        """Of one block: the cosines of all keys."""
        return 2 * visual**2 * shape.head_dim
