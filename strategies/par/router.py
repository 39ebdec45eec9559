"""The network of PAR (https://arxiv.org/abs/2412.06458): decoder blocks over the embedded prompt and layer tokens.

One learnable token for each decoder layer stands behind the prompt; a linear head gives every position one score, of
which those of visual tokens and of layer tokens count. Blocks are Llama's: RMSNorm, rotary positions, gated MLP.

Who attends to whom, `attention`:
    bidirectional: every token to every other. prunekit's own.
    causal: the order of the prompt, layer tokens last, as in the released code
        (ASGO-MM/Pruning-All-Rounder@1890d44, multimodal_selector/selector.py). Where the image comes before the
        question, the scores of its tokens then do not depend on the question.
    text_first: causal, but as if all text stood before all visual tokens.

A ranking cannot say that of tokens alike one is enough: scored alike, they are kept or dropped together, and what is
kept covers less of an image than chance does. `scatter` sets them apart: it times a sequence that covers evenly, the
fractions of multiples of the golden ratio, is added by a visual token's place. prunekit's own; 0 in the released code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from prunekit_strategies.par.config import RouterConfig
from torch import Tensor, nn

GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class Noise:
    """Gaussian noise on the attention logits of every block, for candidates that differ.

    std: its standard deviation. seeds: one for each row of the batch; a row's noise depends on its seed and its own
    length alone, and is drawn on the CPU, so that it is the same in every batch and on every device.
    """

    std: float
    seeds: Sequence[int]


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned scale, computed in at least float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


class Block(nn.Module):
    """One decoder block, (B, n, W) to (B, n, W)."""

    def __init__(self, config: RouterConfig) -> None:
        super().__init__()
        c, width = config, config.width
        self.heads, self.kv_heads, self.head_dim = c.heads, c.kv_heads, c.head_dim
        self.norm1, self.norm2 = RMSNorm(width, c.eps), RMSNorm(width, c.eps)
        self.q = nn.Linear(width, c.heads * c.head_dim, bias=c.bias)
        self.k = nn.Linear(width, c.kv_heads * c.head_dim, bias=c.bias)
        self.v = nn.Linear(width, c.kv_heads * c.head_dim, bias=c.bias)
        self.o = nn.Linear(c.heads * c.head_dim, width, bias=False)
        self.gate = nn.Linear(width, c.mlp, bias=False)
        self.up = nn.Linear(width, c.mlp, bias=False)
        self.down = nn.Linear(c.mlp, width, bias=False)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        """mask: None, bool (B, 1, n, n), or float (B, heads, n, n) to be added to the attention logits."""
        h = self.norm1(x)
        q, k, v = (self._heads(part(h)) for part in (self.q, self.k, self.v))
        q, k = _rotate(q, rotation), _rotate(k, rotation)
        if self.kv_heads != self.heads:
            k, v = (one.repeat_interleave(self.heads // self.kv_heads, 1) for one in (k, v))
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.o(seen.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class Router(nn.Module):
    """Scores of visual tokens and of decoder layers from an embedded prompt."""

    def __init__(self, config: RouterConfig) -> None:
        super().__init__()
        self.config = config
        self.project = nn.Linear(config.hidden, config.width, bias=False) if config.narrow else None
        self.layer_tokens = nn.Parameter(torch.zeros(config.layers, config.width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = RMSNorm(config.width, config.eps)
        self.score = nn.Linear(config.width, 1, bias=False)

    def forward(
        self, embeds: Tensor, visual: Tensor, valid: Tensor, noise: Noise | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits of the prompt's positions, float (B, S), and of the layers, float (B, N); higher is kept first.

        embeds: float (B, S, H). visual, valid: bool (B, S), visual tokens, and no padding (on any side). Scores of
        positions that are no visual tokens mean nothing.
        """
        rows, layers = len(embeds), self.config.layers
        x = embeds if self.project is None else self.project(embeds)
        x = torch.cat([x, self.layer_tokens.to(x.dtype).expand(rows, -1, -1)], 1)
        tokens = F.pad(valid, (0, layers), value=True)
        positions = self._positions(visual, valid)
        rotation = self._rotation(positions, x)
        mask = self._mask(positions, tokens)
        for number, block in enumerate(self.blocks):
            x = block(x, rotation, mask if noise is None else self._noisy(mask, tokens, noise, number, x))
        scores = self.score(self.norm(x))[..., 0]
        return scores[:, :-layers] + self._apart(visual, scores), scores[:, -layers:]

    def _apart(self, visual: Tensor, like: Tensor) -> Tensor:
        """What is added for the places of visual tokens among each other, float (B, S) from 0 to `scatter`."""
        place = visual.cumsum(1).to(torch.promote_types(like.dtype, torch.float32))
        return (self.config.scatter * (place * GOLDEN).frac()).to(like)

    def _positions(self, visual: Tensor, valid: Tensor) -> Tensor:
        """Position of every token, int64 (B, S + N); of padding, any value."""
        if self.config.attention == "text_first":
            text = valid & ~visual
            positions = torch.where(visual, text.sum(1, keepdim=True) + visual.cumsum(1), text.cumsum(1)) - 1
        else:
            positions = valid.cumsum(1) - 1
        behind = torch.arange(self.config.layers, device=valid.device) + valid.sum(1, keepdim=True)
        return torch.cat([positions.clamp(min=0), behind], 1)

    def _mask(self, positions: Tensor, tokens: Tensor) -> Tensor | None:
        """Who attends to whom, bool (B, 1, n, n); None: all to all. Padding attends to all, so that no row is empty."""
        if self.config.attention == "bidirectional" and bool(tokens.all()):
            return None
        mask = tokens[:, None, :].expand(-1, tokens.shape[1], -1)
        if self.config.attention != "bidirectional":
            mask = mask & (positions[:, None, :] <= positions[:, :, None])
        return (mask | ~tokens[:, :, None])[:, None]

    def _noisy(self, mask: Tensor | None, tokens: Tensor, noise: Noise, number: int, x: Tensor) -> Tensor:
        """The mask of one block with its noise, float (B, heads, n, n); it reaches sdpa as an additive mask."""
        rows, width = tokens.shape
        added = torch.zeros(rows, self.config.heads, width, width, dtype=x.dtype, device=x.device)
        for row, seed in enumerate(noise.seeds):
            own = tokens[row].nonzero()[:, 0]
            generator = torch.Generator().manual_seed((seed * 1009 + number) % 2**63)
            drawn = torch.randn(self.config.heads, len(own), len(own), generator=generator) * noise.std
            added[row, :, own[:, None], own] = drawn.to(added)
        return added if mask is None else added.masked_fill(~mask, -torch.inf)

    def _rotation(self, positions: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        half = torch.arange(0, self.config.head_dim, 2, device=x.device, dtype=torch.float32) / self.config.head_dim
        angles = positions[..., None].float() * self.config.theta**-half
        angles = torch.cat([angles, angles], -1)[:, None]
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def _rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = rotation
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin
