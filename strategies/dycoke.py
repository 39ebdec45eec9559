"""DyCoke (https://arxiv.org/abs/2411.15024, CVPR 2025): of four frames one stays whole, of the others what is new.

Rule, for frames t = 0, 1, ... of a video: frames with t mod 4 = 0 stay whole. Odd frames keep the int((1 - k) n) of
their n tokens with the lowest cosine to the token at the same place in frame t - 1, those with t mod 4 = 2 to that in
frame t - 2. Nothing is merged.

Studied: KD-TAO/DyCoke@dd74634. Deviations: the authors' loops miss some frames: the one with t mod 4 = 2 of the last
four stays whole, and of an odd number of frames the last one is lost; `groups: official` does the same. Positions stay.
Tokens at whose place nothing is left before count as new. Still images and newlines pass.
Only the part in front of the decoder is here. The other part looks, at every decoding step, at the attention of one
layer and hides a part of the KV cache from the layers behind it: `decode` is refused, since no hook is asked then.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from prunekit import ModelShape, hookimpl, strategy
from prunekit.ops import clip_shares, group_sizes, group_top_k, precise, same_place


@strategy(
    paper="2411.15024", code="KD-TAO/DyCoke@dd74634", group="video", fixed_count=True, keep="refused", per_sample=True
)
class DyCoke:
    """Of each four frames of a video keep the first, and of the others what is least like it looked before.

    k: the part of a frame that leaves where it is compared. groups: whether the last frames are treated as all others,
    or as in the authors' code. decode: the part of the KV cache to hide while decoding, which is not built.
    """

    k: float = 0.7
    groups: Literal["complete", "official"] = "complete"
    decode: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.k <= 1:
            raise ValueError(f"k: is {self.k}; it is a part, from 0 to 1")
        if self.decode is not None:
            raise ValueError(
                "decode: DyCoke's choice of KV at every decoding step is not built, as hooks are asked while the "
                "prompt is read; leave it out, and let a stage in the decoder, such as 'fastv', shorten the KV cache"
            )

    @hookimpl
    def select_tokens(self, hidden: Tensor, coords: Tensor, frames: Tensor, videos: Tensor) -> Tensor:
        """Bool (V,)."""
        keep, clips = clip_shares(coords, frames, videos, None)
        x, one, two = precise(hidden), same_place(coords, frames, 1), same_place(coords, frames, 2)
        for tokens, _ in clips:
            frame = frames[tokens]
            number = int(frame.max()) + 1
            before = torch.where(frame % 2 == 1, one[tokens], two[tokens])
            alike = cosine_similarity(x[tokens], x[before.clamp(min=0)], dim=-1).masked_fill(before < 0, -torch.inf)
            sizes = group_sizes(frame, number)
            quota = (sizes.double() * (1 - self.k)).long()
            quota[::4] = sizes[::4]
            if self.groups == "official":
                last = (number - 1) // 4 * 4 + 2
                quota[last : last + 1] = sizes[last : last + 1]
                quota[number - number % 2 :] = 0
            keep[tokens] = group_top_k(-alike, frame, quota)
        return keep

    @hookimpl
    def flops(self, shape: ModelShape, text: int, visual: int) -> int:
        """A cosine for each token."""
        return 6 * visual * shape.hidden
