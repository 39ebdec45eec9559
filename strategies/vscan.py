"""VScan (https://arxiv.org/abs/2505.22654): a local and a global scan of the tower's attention, one in the decoder.

Rule: Tencent/SelfEvolvingAgent@a82450e, folder VScan. For T tokens of a crop, h = int(T / 2): in each of its 4 x 4
windows (6 x 6 patches of LLaVA-1.5) the int(h / 16) tokens to which CLS attends most in block `shallow`; then of all
others the T - h to which it attends most in the block of the image features. Every dropped token joins the kept token
of its crop with the most similar projected features; groups become their mean. In the decoder (`vscan_decoder`): half
the way through, the tokens to which the last prompt token will attend most in the layer ahead; the paper leaves 32 of
LLaVA-1.5's 576 tokens there, after 96, and 64 on average.
Deviations: `counts: exact`, the default, also fills by the global scan what the rounding of h / 16 loses; with
`official` 41 tokens are left of 50 asked for. T is a crop's share of the count, in proportion to its tokens. Newlines
stay only where everything does.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from prunekit import EncoderRows, ModelShape, Owners, Rows, Selection, Site, Sites, hookimpl, strategy
from prunekit.ops import cosine, crop_quotas, group_sizes, group_top_k, nearest_kept

SIDE = 4


def _shallow(blocks: int) -> int:
    """Block 5 of 24."""
    return 5 * blocks // 24


@strategy(
    paper="2505.22654",
    code="Tencent/SelfEvolvingAgent@a82450e",
    sites=Sites(decoder=False),
    per_sample=True,
    inputs=lambda self: {
        "encoder_attention": (EncoderRows(layer=_shallow if self.shallow is None else self.shallow), EncoderRows())
    },
)
class VScan:
    """Keep what CLS attends to most within each window early in the tower, and anywhere late; merge the others.

    shallow: the block of the local scan; null: a fifth into the tower, of 24 blocks the paper's 5. counts: what is
    left, exactly as asked or as the authors round it.
    """

    shallow: int | None = None
    counts: Literal["exact", "official"] = "exact"

    @hookimpl
    def select_tokens(
        self, encoder_attention: tuple[Tensor, Tensor], hidden: Tensor, coords: Tensor, frames: Tensor, count: int
    ) -> Selection:
        """Bool (V,) and who joins whom, from attention rows, float (V,) each, and projected tokens, float (V, H)."""
        early, late = encoder_attention
        groups, quota = crop_quotas(coords, frames, count)
        local = group_top_k(early, self._windows(coords, groups), (quota // 2 // SIDE**2).repeat_interleave(SIDE**2))
        found = group_sizes(groups.masked_fill(~local, -1), len(quota))
        rest = quota - (found if self.counts == "exact" else quota // 2)
        keep = local | group_top_k(late, groups.masked_fill(local, -1), rest)
        same = groups[:, None] == groups
        owner = nearest_kept(cosine(hidden).masked_fill(~same, -torch.inf), keep)
        # A crop of which nothing stays has nobody to join.
        return Selection(keep, Owners(owner.masked_fill(groups[owner] != groups, -1)))

    def _windows(self, coords: Tensor, groups: Tensor) -> Tensor:
        row, column, rows, columns = coords[:, 1:].unbind(1)
        windows = (groups * SIDE + row * SIDE // rows) * SIDE + column * SIDE // columns
        return windows.masked_fill(row < 0, -1)

    @hookimpl
    def flops(self, shape: ModelShape, text: int, visual: int) -> int:
        """Two rows of a tower as wide as the decoder, and all cosines."""
        return (2 * visual**2 + 4 * visual) * shape.hidden


@strategy(
    paper="2505.22654",
    code="Tencent/SelfEvolvingAgent@a82450e",
    sites=Sites(default=lambda layers: Site(layers // 2), encoder=False),
    inputs={"attention": Rows(layer="next", queries="last", heads="mean")},
)
class VScanDecoder:
    """Keep what the last prompt token attends to most in the layer ahead, by default the middle one."""

    @hookimpl
    def score_tokens(self, attention: Tensor) -> Tensor:
        """The attention itself, (B, V)."""
        return attention

    @hookimpl
    def flops(self, shape: ModelShape, text: int, visual: int) -> int:
        """Keys of the layer ahead, and one row."""
        keys = shape.hidden * (shape.kv_width // 2)
        return 2 * (text + visual) * (keys + shape.heads * shape.head_dim)
