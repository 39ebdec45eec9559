"""IVC-Prune (https://arxiv.org/abs/2602.03060, ICLR 2026): tokens that tell where things are, and the foreground.

A_ij = mean over heads of softmax_j(v_i . v_j / sqrt(d)), of values in layer K - 1, without mask and rotation. Seeds:
the round(0.01 N) with the highest mean A over the question, the text behind the image but its first two tokens.
Foreground: the round(0.2 N) with the highest mean over question and seeds together. Implicit visual coordinates: the
round(0.05 N) positions whose rotation has the highest mean cosine, and as many with the highest mean sine. All three
stay, from layer K (half the depth) on and in the KV of the layers before.

Rule: FireRedTeam/IVC-Prune@03afd9c, as for LLaVA. With `keep` as for Qwen2.5-VL: A over the visual tokens alone, 0.1 N
of each kind of coordinates, over all axes of M-RoPE; these and the seeds stay first, the others by the score. Their
constants are options here. Deviations: exactly `count` stay, the authors keep all coordinates and seeds where those are
more; of several images the last one ends where the question begins; where the prompt is shorter, all text behind the
image asks, without any all tokens do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prunekit import ModelShape, Selection, Site, Sites, Values, hookimpl, strategy
from prunekit.ops import precise, ranks, top_k_mask

VALUES = Values(heads="none")


def _alike(rows: Tensor, keys: Tensor) -> Tensor:
    """A of values (Q, A, D) with values (K, A, D): float (Q, K)."""
    return (torch.einsum("qad,kad->aqk", rows, keys) / rows.shape[-1] ** 0.5).softmax(-1).mean(0)


@strategy(
    paper="2602.03060",
    code="FireRedTeam/IVC-Prune@03afd9c",
    sites=Sites(default=lambda layers: Site(max(layers // 2, 1)), encoder=False, lowest=1),
    inputs={"values": VALUES, "text_values": VALUES},
    keep="optional",
    per_sample=True,
    crops=True,
)
class IVCPrune:
    """Keep tokens with values like the question's, and those at positions that rotate like an origin.

    seeds, foreground: fractions of the visual tokens; `foreground` is for stages without `keep`. coordinates: of each
    of the two kinds; null is 0.05, with `keep` 0.1. skip: tokens behind the image that are not of the question.
    """

    seeds: float = 0.01
    foreground: float = 0.2
    coordinates: float | None = None
    skip: int = 2

    def __post_init__(self) -> None:
        for name in ("seeds", "foreground", "coordinates"):
            if not 0 <= (getattr(self, name) or 0.0) <= 1:
                raise ValueError(f"{name}: is a fraction, from 0 to 1")
        if self.skip < 0:
            raise ValueError("skip: is at least 0")

    @hookimpl
    def select_tokens(
        self, values: Tensor, text_values: Tensor, text_after: Tensor, rotary: Tensor, count: int | None
    ) -> Selection:
        """Bool (V,) from values, float (V, A, D) and (T, A, D), and rotations, float (V, P, R)."""
        visual, text = precise(values), precise(text_values)
        tokens, everything = len(visual), torch.cat([visual, text])
        keys = everything if count is None else visual
        behind = text[text_after]
        asking = next(one for one in (behind[self.skip :], behind, everything) if len(one))
        rows = _alike(asking, keys)[:, :tokens]
        seeds = top_k_mask(rows.mean(0), max(round(self.seeds * tokens), 1))
        score = torch.cat([rows, _alike(visual[seeds], keys)[:, :tokens]]).mean(0)
        first = seeds | self._coordinates(rotary, count is not None)
        if count is None:
            return Selection(first | top_k_mask(score, round(self.foreground * tokens)), crop=True)
        return Selection(top_k_mask(tokens * first - ranks(score), count), crop=True)

    def _coordinates(self, rotary: Tensor, budgeted: bool) -> Tensor:
        """The implicit visual coordinates, bool (V,)."""
        share = self.coordinates if self.coordinates is not None else 0.1 if budgeted else 0.05
        number = round(share * len(rotary))
        cosine, sine = (part.double().mean((1, 2)) for part in rotary.chunk(2, dim=-1))
        return top_k_mask(cosine, number) | top_k_mask(sine, number)

    @hookimpl
    def flops(self, shape: ModelShape, text: int, visual: int) -> int:
        """Products of values of at most all text, and of the seeds, with all."""
        return (text + round(self.seeds * visual) + 1) * (text + visual) * shape.kv_width
