"""The CLIP tower and projector in plain PyTorch, under the names that transformers gives their weights."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from prunekit_evals.micro.compose import GRID, IMAGE_SIZE, PATCH_SIZE, TOKENS
from prunekit_evals.smol.base import WIDTH
from torch import Tensor, nn

VISION_WIDTH, VISION_LAYERS, VISION_HEADS = 128, 6, 4
FOURIER = 32  # channels of the position embedding that begin as sines of the patch's place


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(VISION_WIDTH, VISION_WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part(x).unflatten(-1, (VISION_HEADS, -1)).transpose(1, 2)
            for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(VISION_WIDTH, 4 * VISION_WIDTH), nn.Linear(4 * VISION_WIDTH, VISION_WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x)
        return self.fc2(hidden * torch.sigmoid(1.702 * hidden))  # CLIP's quick GELU


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.mlp = _Attention(), _Mlp()
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(VISION_WIDTH), nn.LayerNorm(VISION_WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class _Embeddings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(VISION_WIDTH) * 0.02)
        self.patch_embedding = nn.Conv2d(3, VISION_WIDTH, PATCH_SIZE, PATCH_SIZE, bias=False)
        self.position_embedding = nn.Embedding(TOKENS + 1, VISION_WIDTH)

    def forward(self, images: Tensor) -> Tensor:
        patches = images.unflatten(3, (GRID, PATCH_SIZE)).unflatten(2, (GRID, PATCH_SIZE))  # B, 3, y, p, x, p
        flat = patches.permute(0, 2, 4, 1, 3, 5).reshape(len(images), TOKENS, -1)
        seen = F.linear(flat, self.patch_embedding.weight.flatten(1))  # the convolution, as one product
        first = self.class_embedding.to(seen.dtype).expand(len(images), 1, -1)
        return torch.cat([first, seen], 1) + self.position_embedding.weight.to(seen.dtype)


class _Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer() for _ in range(VISION_LAYERS))


class Tower(nn.Module):
    """Features of the last layer but one, CLS first, `[B, 145, 128]`, and the normed CLS of the last `[B, 128]`."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings, self.encoder = _Embeddings(), _Encoder()
        self.pre_layrnorm, self.post_layernorm = nn.LayerNorm(VISION_WIDTH), nn.LayerNorm(VISION_WIDTH)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = self.pre_layrnorm(self.embeddings(images))
        *first, last = self.encoder.layers
        for layer in first:
            x = layer(x)
        return x, self.post_layernorm(last(x)[:, 0])


class Projector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(VISION_WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(features)))


class Vision(nn.Module):
    """Tower and projector."""

    def __init__(self, seed: int, middle: Tensor) -> None:
        """`middle`: float `[576]`, what the projector first says everywhere."""
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.vision_tower, self.multi_modal_projector = Tower(), Projector()
            self._start(middle)

    @torch.no_grad()
    def _start(self, middle: Tensor) -> None:
        depth = (2 * VISION_LAYERS) ** -0.5
        for name, p in self.named_parameters():
            if p.ndim >= 2 and "position" not in name:
                nn.init.normal_(p, std=p[0].numel() ** -0.5)
            if name.endswith(("out_proj.weight", "fc2.weight")):
                p.mul_(depth)
            if name.endswith("bias") and "norm" not in name:
                p.zero_()
        places = self.vision_tower.embeddings.position_embedding.weight
        places.normal_(std=0.02)
        places[1:, :FOURIER] = _fourier()
        self.multi_modal_projector.linear_2.weight.mul_(0.1)
        self.multi_modal_projector.linear_2.bias.copy_(middle)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of uint8 `[B, 168, 168, 3]` the visual tokens `[B, 144, 576]`, features `[B, 145, 128]`, CLS `[B, 128]`."""
        pixels = images.permute(0, 3, 1, 2).float() / 127.5 - 1
        features, pooled = self.vision_tower(pixels)
        return self.multi_modal_projector(features[:, 1:]), features, pooled


def _fourier() -> Tensor:
    """Sines and cosines of row and column in `FOURIER / 4` wavelengths, float `[144, FOURIER]`."""
    place = torch.arange(GRID) / GRID * 2 * math.pi
    waves = place[:, None] * 2.0 ** torch.linspace(-1, 2.5, FOURIER // 4)
    one = torch.cat([waves.sin(), waves.cos()], 1)
    return torch.cat([one.repeat_interleave(GRID, 0), one.repeat(GRID, 1)], 1) * 0.5


assert IMAGE_SIZE == GRID * PATCH_SIZE
