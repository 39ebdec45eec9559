"""SmolLM2 with low-rank adapters, for training: many questions share one image prefix, tokens and layers may go.

The forward is written out for speed and says the same as transformers' (a test compares them). The four matrices of a
layer (queries, keys and values in one; gate and up in one) each have one adapter of rank `RANK`; the sum `W + B A` is
formed once a step, and the backward forms the adapters' gradients without ever forming that of the sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from prunekit_evals.smol.adapters import KINDS
from prunekit_evals.smol.base import HEADS, KV_HEADS, WIDTH
from torch import Tensor, nn

RANK = 16
SCALE = 1.5  # of `B A`; keeps the useful learning rate near the tower's
HEAD = WIDTH // HEADS
EPS, THETA = 1e-5, 100_000.0
LONGEST = 1024  # positions of a training row at most
Groups = tuple[tuple[int, int], ...]  # (rows, padded length) of the questions that follow an image, in order


@dataclass(frozen=True)
class Cut:
    """What a forward leaves out: layers for every token, and visual tokens from one layer on.

    keep: int64 `[B, K]`, sorted indices of the visual tokens that stay before layer `layer`; None: all stay.
    """

    skip: frozenset[int] = frozenset()
    layer: int = 0
    keep: Tensor | None = None

    @property
    def nothing(self) -> bool:
        return not self.skip and self.keep is None


WHOLE = Cut()


class _Thin(torch.autograd.Function):
    """`x W^T` for `W = base + b a`, with gradients for x, a and b only."""

    @staticmethod
    def forward(ctx, x, merged, a, b):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, merged, a, b)
        return x @ merged.T

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        x, merged, a, b = ctx.saved_tensors
        return g @ merged, None, (g @ b).T @ x, g.T @ (x @ a.T)


@dataclass(frozen=True)
class Merged:
    """The matrices of every layer for one step: of each kind `(W + B A, A, B)`, in the dtype of the arithmetic."""

    layers: list[dict[str, tuple[Tensor, Tensor, Tensor]]]


class Decoder(nn.Module):
    """Holds the frozen base in float32 and trains the adapters; `dtype` is that of states and matrices."""

    def __init__(self, base: Mapping[str, np.ndarray], dtype: torch.dtype, seed: int = 0) -> None:
        super().__init__()
        self.dtype = dtype
        noise = torch.Generator().manual_seed(seed)
        self.layers = sum(name.endswith("input_layernorm.weight") for name in base)
        self.a, self.b = nn.ParameterDict(), nn.ParameterDict()
        for kind, (parts, rows, columns) in KINDS.items():
            stacked = [np.concatenate([base[f"layers.{i}.{p}.weight"] for p in parts]) for i in range(self.layers)]
            self.register_buffer(kind, torch.from_numpy(np.stack(stacked)), persistent=False)
            self.a[kind] = nn.Parameter(torch.randn(self.layers, RANK, columns, generator=noise) * columns**-0.5)
            self.b[kind] = nn.Parameter(torch.zeros(self.layers, rows, RANK))
        for name in ("input_layernorm", "post_attention_layernorm"):
            norms = np.stack([base[f"layers.{i}.{name}.weight"] for i in range(self.layers)])
            self.register_buffer(name, torch.from_numpy(norms).to(dtype), persistent=False)
        self.register_buffer("norm", torch.from_numpy(base["norm.weight"]).to(dtype), persistent=False)
        self.register_buffer("embed", torch.from_numpy(base["embed_tokens.weight"]).to(dtype), persistent=False)
        turns = torch.arange(LONGEST)[:, None] / THETA ** (torch.arange(0, HEAD, 2) / HEAD)
        turns = torch.cat([turns, turns], -1)
        self.register_buffer("cos", turns.cos().to(dtype), persistent=False)
        self.register_buffer("sin", turns.sin().to(dtype), persistent=False)

    def merged(self) -> Merged:
        layers: list[dict[str, tuple[Tensor, Tensor, Tensor]]] = [{} for _ in range(self.layers)]
        for kind in KINDS:
            a, b = self.a[kind], SCALE * self.b[kind]
            with torch.no_grad():
                whole = torch.baddbmm(getattr(self, kind), b, a).to(self.dtype)
            parts = (whole.unbind(0), a.to(self.dtype).unbind(0), b.to(self.dtype).unbind(0))
            for layer, three in zip(layers, zip(*parts, strict=True), strict=True):
                layer[kind] = three
        return Merged(layers)

    def forward(
        self, merged: Merged, lead: Tensor, visual: Tensor | None, ids: Tensor, groups: Groups, cut: Cut = WHOLE,
        watch: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """States after the final norm of the questions' tokens, `[B, S, H]`.

        lead: int64 `[N]`, text before the image. visual: `[B, 144, H]`; None: no image. ids: int64 `[B, S]`, the rows
        of `groups` one after another. watch: a layer whose attention from every question token to the prefix is
        returned too, mean over heads, float `[B, S, N + K]`; else None.
        """
        batch = len(ids)
        prefix = self.embed[lead].expand(batch, -1, -1)
        if visual is not None:
            prefix = torch.cat([prefix, visual.to(self.dtype)], 1)
        ends = prefix.shape[1]
        x = torch.cat([prefix, self.embed[ids]], 1)
        inside = torch.cat([torch.arange(n, device=ids.device).repeat(count) for count, n in groups])
        at = torch.cat([torch.arange(ends, device=ids.device), ends + inside]).expand(batch, -1)
        turn = self._turn(at)
        seen = None
        for number, layer in enumerate(merged.layers):
            if cut.keep is not None and number == cut.layer:
                x, at, ends = _shorten(x, at, cut.keep, len(lead), ends)
                turn = self._turn(at)
            if number in cut.skip:
                continue
            x, looked = self._layer(number, layer, x, turn, ends, groups, watch == number)
            seen = looked if watch == number else seen
        return F.rms_norm(x[:, ends:], (WIDTH,), self.norm, EPS), seen

    def logits(self, states: Tensor) -> Tensor:
        """Float logits `[..., 49152]`."""
        return (states @ self.embed.T).float()

    def _turn(self, at: Tensor) -> tuple[Tensor, Tensor]:
        return self.cos[at][:, :, None], self.sin[at][:, :, None]

    def _layer(
        self, number: int, layer: Mapping[str, tuple[Tensor, Tensor, Tensor]], x: Tensor, turn: tuple[Tensor, Tensor],
        ends: int, groups: Groups, watch: bool,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        shape = x.shape
        norm = F.rms_norm(x, (WIDTH,), self.input_layernorm[number], EPS).view(-1, WIDTH)
        q, k, v = _Thin.apply(norm, *layer["qkv"]).view(*shape[:2], -1, HEAD).split((HEADS, KV_HEADS, KV_HEADS), 2)
        mixed, seen = _attend(_rotated(q, turn), _rotated(k, turn), v, ends, groups, watch)
        x = x + _Thin.apply(mixed.reshape(-1, WIDTH), *layer["out"]).view(shape)
        norm = F.rms_norm(x, (WIDTH,), self.post_attention_layernorm[number], EPS).view(-1, WIDTH)
        gate, up = _Thin.apply(norm, *layer["up"]).chunk(2, -1)
        return x + _Thin.apply(F.silu(gate) * up, *layer["down"]).view(shape), seen


def _rotated(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    one, other = x.chunk(2, -1)
    return x * turn[0] + torch.cat([-other, one], -1) * turn[1]


def _shorten(x: Tensor, at: Tensor, keep: Tensor, lead: int, ends: int) -> tuple[Tensor, Tensor, int]:
    """Only the kept visual tokens between the lead and the questions; positions stay."""
    chosen = torch.cat([torch.arange(lead, device=x.device).expand(len(x), -1), lead + keep], 1)
    states = x.gather(1, chosen[..., None].expand(-1, -1, x.shape[-1]))
    return torch.cat([states, x[:, ends:]], 1), torch.cat([at.gather(1, chosen), at[:, ends:]], 1), chosen.shape[1]


def _attend(q: Tensor, k: Tensor, v: Tensor, ends: int, groups: Groups, watch: bool) -> tuple[Tensor, Tensor | None]:
    """The prefix sees itself, a question the prefix and itself; `[B, T, 9, 64]` -> `[B, T, 576]`."""
    batch, rep = len(q), HEADS // KV_HEADS
    keys, values = k[:, :ends].transpose(1, 2), v[:, :ends].transpose(1, 2)  # [B, 3, P, D]
    every = (keys.repeat_interleave(rep, 1), values.repeat_interleave(rep, 1))
    seeing = F.scaled_dot_product_attention(q[:, :ends].transpose(1, 2), *every, is_causal=True)
    mixed = [seeing.transpose(1, 2).flatten(2)]
    begin, seen = ends, []
    for count, length in groups:
        part = slice(begin, begin + count * length)
        begin = part.stop
        asked = q[:, part].reshape(batch, count, length, KV_HEADS, rep, HEAD)
        own, owned = (t[:, part].reshape(batch, count, length, KV_HEADS, HEAD).transpose(2, 3) for t in (k, v))
        to_prefix = asked.permute(0, 3, 4, 1, 2, 5).reshape(batch, KV_HEADS, -1, HEAD)  # B, 3, (rep n L), D
        to_own = asked.permute(0, 1, 3, 4, 2, 5).reshape(batch, count, KV_HEADS, -1, HEAD)  # B, n, 3, (rep L), D
        far = (to_prefix @ keys.transpose(-1, -2)).view(batch, KV_HEADS, rep, count, length, ends)
        near = (to_own @ own.transpose(-1, -2)).view(batch, count, KV_HEADS, rep, length, length)
        near = near.permute(0, 2, 3, 1, 4, 5)
        later = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
        scores = torch.cat([far, near.masked_fill(later, -torch.inf)], -1) * HEAD**-0.5
        far, near = scores.softmax(-1).split((ends, length), -1)
        if watch:
            seen.append(far.float().mean((1, 2)).flatten(1, 2))
        out = (far.reshape(batch, KV_HEADS, -1, ends) @ values).view(batch, KV_HEADS, rep, count, length, HEAD)
        near = near.permute(0, 3, 1, 2, 4, 5).reshape(batch, count, KV_HEADS, -1, length) @ owned
        out = out + near.view(batch, count, KV_HEADS, rep, length, HEAD).permute(0, 2, 3, 1, 4, 5)
        mixed.append(out.permute(0, 3, 4, 1, 2, 5).reshape(batch, count * length, WIDTH))
    return torch.cat(mixed, 1), torch.cat(seen, 1) if watch else None
