"""ToDRE, first stage (https://arxiv.org/abs/2505.18757): one pivot, and the tokens that are least like all chosen ones.

Rule: the paper's (v2), of which no code was found. The pivot is the token of the whole image to which CLS attends most;
then always the token with the lowest sum of cosines to the chosen ones is taken, in the decoder's embedding space, from
one pool of all crops and images. The paper keeps 288 of LLaVA-NeXT's 2,880 tokens.
Deviations: the whole image is the first crop; of a video that is the first frame, where the paper takes the best of all
frames. For towers without CLS `pivot: mean` takes what all tokens attend to most, where the paper draws at random.
The second stage, which drops all visual tokens at a late layer where text and image hardly attend to each other, is not
here: it needs sums of attention between visual and text tokens, which no input gives.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from prunekit import EncoderRows, ModelShape, hookimpl, strategy
from prunekit.ops import cosine, index_mask, max_sum


@strategy(paper="2505.18757", per_sample=True, inputs=lambda self: {"encoder_attention": EncoderRows(query=self.pivot)})
class ToDRE:
    """Repeatedly keep the token that is least similar to all kept ones together, from the most attended one on."""

    pivot: Literal["cls", "mean"] = "cls"

    @hookimpl
    def select_tokens(self, encoder_attention: Tensor, hidden: Tensor, frames: Tensor, count: int) -> Tensor:
        """Bool (V,) from the tower's attention, float (V,), and the tokens' states, float (V, H)."""
        # Attention is at most 1, so that other crops come behind the first.
        first = encoder_attention.double() - 2.0 * (frames > 0)
        return index_mask(max_sum(cosine(hidden), first, count), len(hidden))

    @hookimpl
    def flops(self, shape: ModelShape, text: int, visual: int) -> int:
        """At most: cosines, the products of an attention map as wide as the decoder, and a step for every token."""
        return visual**2 * (4 * shape.hidden + 1)
