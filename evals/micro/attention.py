"""The training attention: plain matmul-softmax, and one image prefix shared by many questions.

A training row is `[image prefix | questions of length L1 | questions of length L2 | ...]`. Every question
attends to the whole prefix and causally to itself, never to another question, exactly as if it were alone
after the image. Scores between questions are never computed, which is most of the saving.
On CPU this beats the fused kernels by 4x in forward + backward at these sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

NAME = "prunekit_micro_training"

# Called with the layer, the group and the attention `[B, H, count * L, prefix]` of its questions.
AttentionObserver = Callable[[int, int, Tensor], None]


@dataclass(frozen=True)
class Layout:
    """`prefix` tokens, then for every `(count, length)` group that many questions of that padded length."""

    prefix: int
    groups: tuple[tuple[int, int], ...]

    def positions(self, prefix_positions: Tensor, start: int) -> Tensor:
        """Position ids `[B, S]`: the prefix's own (int64 `[B, prefix]`), each question from `start`."""
        parts = [torch.arange(start, start + length).repeat(count) for count, length in self.groups]
        return torch.cat([prefix_positions, *(p.expand(len(prefix_positions), -1) for p in parts)], 1)


def _causal(scores: Tensor) -> Tensor:
    length = scores.shape[-1]
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    return scores.masked_fill(later, -1e4)


def _hide(scores: Tensor, hidden: Tensor | None) -> Tensor:
    return scores if hidden is None else scores.masked_fill(hidden[:, None, None, :], -1e4)


def _questions(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, count: int, hidden: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Outputs `[B, H, count * L, D]` of one group of questions, and what they attended to in the prefix.

    `q` is scaled already.
    """
    B, H, S, D = q.shape
    own = _causal(q.view(B, H, count, S // count, D) @ k.view(B, H, count, S // count, D).mT)
    scores = torch.cat([_hide(q @ prefix_k.mT, hidden), own.view(B, H, S, S // count)], -1)
    seen, own = scores.softmax(-1).split([prefix_k.shape[2], S // count], -1)
    out = own.reshape(B, H, count, S // count, S // count) @ v.view(B, H, count, S // count, D)
    return seen @ prefix_v + out.view(B, H, S, D), seen


def shared_prefix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    layout: Layout | None = None,
    observe: AttentionObserver | None = None,
    cut: tuple[int, Tensor] | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Attention interface of transformers; `[B, H, S, D]` in, `[B, S, H, D]` out. No layout: no mask.

    `cut = (layer, hidden)` hides prefix tokens (bool `[B, prefix]`) from everything from that layer on.
    """
    query = query * scaling
    if layout is None:
        return ((query @ key.mT).softmax(-1) @ value).transpose(1, 2), None
    sizes = [layout.prefix, *(count * length for count, length in layout.groups)]
    q, k, v = (x.split(sizes, 2) for x in (query, key, value))
    hidden = cut[1] if cut is not None and module.layer_idx >= cut[0] else None
    outs = [_hide(_causal(q[0] @ k[0].mT), hidden).softmax(-1) @ v[0]]
    for i, (count, _length) in enumerate(layout.groups, 1):
        parts = (q[i].contiguous(), k[i].contiguous(), v[i].contiguous())
        out, seen = _questions(*parts, k[0], v[0], count, hidden)
        outs.append(out)
        if observe is not None:
            observe(module.layer_idx, i - 1, seen)
    return torch.cat(outs, 2).transpose(1, 2), None


AttentionInterface.register(NAME, shared_prefix_attention)
