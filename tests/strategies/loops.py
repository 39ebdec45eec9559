"""What naive twins of strategies share: loops over lists, written for reading; and asking a stage about one sample."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from asking import ask
from torch import Tensor

from prunekit import Selection
from prunekit.pipeline.stage import Stage

SEEDS = range(50)


def decided(stage: Stage, count: int | None, **arguments: Any) -> Selection:
    """What a stage decides about one sample, whose inputs are given without the batch axis."""
    first = arguments.get("attention", arguments.get("hidden"))
    visual = len(first[0] if isinstance(first, tuple) else first)
    given = {"valid": torch.ones(visual, dtype=torch.bool), "count": count, "seed": 0, "state": {}, "cut": 0}
    given |= arguments
    if not stage.per_sample:
        given = {name: _batched(value) if name != "cut" else value for name, value in given.items()}
    if "scores" in stage.requests("select_tokens"):
        given["scores"] = ask(stage, "score_tokens", **given)
    answer = ask(stage, "select_tokens", **given)
    if isinstance(answer, Selection):
        return answer
    return Selection(answer if stage.per_sample else answer[0])


def kept(stage: Stage, count: int | None, **arguments: Any) -> list[int]:
    """The indices that it keeps, ascending."""
    return decided(stage, count, **arguments).keep.nonzero()[:, 0].tolist()


def _batched(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value[None]
    return tuple(_batched(one) for one in value) if isinstance(value, tuple) else {} if value == {} else (value,)


def best(scores: Sequence[float], count: int) -> list[int]:
    """The highest scores first, on ties the lower index."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count]


def cosine(x: Sequence[float], y: Sequence[float]) -> float:
    product = sum(a * b for a, b in zip(x, y, strict=True))
    lengths = math.sqrt(sum(a * a for a in x)) * math.sqrt(sum(b * b for b in y))
    return product / lengths if lengths else 0.0


def some(seed: int, *shape: int, ties: bool = False) -> Tensor:
    """Seeded numbers, float64; with ties few different ones."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (drawn * 2).round() / 2 if ties else drawn


def sizes(seed: int) -> tuple[int, int]:
    """Visual tokens and a count to keep: even and odd, and the smallest that there are."""
    visual = (1, 2, 3, 16, 17, 33)[seed % 6]
    return visual, (1, visual, max(visual // 2, 1), max(visual // 3, 1), max(visual - 1, 1))[seed % 5]


def normed(states: Tensor, weight: Tensor) -> Tensor:
    """RMS norm."""
    return states / (states.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def heads_of(x: Tensor, heads: int) -> Tensor:
    """(S, A * D) as (A, S, D)."""
    return x.view(len(x), heads, -1).transpose(0, 1)


def turned(x: Tensor, base: float) -> Tensor:
    """Rotated at positions 0, 1, ...: halves, the second turned in front of the first with its sign changed."""
    length, dim = x.shape[-2:]
    frequency = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    angle = torch.cat([angle, angle], dim=-1)
    first, second = x.chunk(2, dim=-1)
    return x * angle.cos().to(x) + torch.cat([-second, first], dim=-1) * angle.sin().to(x)
