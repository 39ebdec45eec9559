"""Strategies of the study alone, brought in through the same hooks as anyone's."""

from __future__ import annotations

import torch
from torch import Tensor

from prunekit import ModelShape, Route, Rows, Site, Sites, hookimpl, plugins, strategy
from prunekit.registry import Registry


def _generator(seed: int, drawn: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed + 1_000_003 * drawn) % 2**63)


@strategy(
    sites=Sites(default=Site(2), encoder=False, lowest=1),
    inputs={"attention": Rows(layer="previous", queries="last", heads="mean")},
    per_sample=True,
)
class NoisyAttention:
    """Visual tokens that the last prompt token attends to most, after noise on the logarithm of its attention.

    On the attention logits of one head that is the noise which PAR's code puts on its router's; here it meets the mean
    over heads. seed: another seed, another draw. std: of the noise.
    """

    seed: int = 0
    std: float = 1.0

    @hookimpl
    def score_tokens(self, attention: Tensor, seed: int) -> Tensor:
        """Log attention and noise, float (V,)."""
        noise = torch.randn(len(attention), generator=_generator(seed, self.seed)) * self.std
        return attention.clamp(min=1e-30).log() + noise.to(attention)


@strategy(sites=Sites(default=Site(2)), per_sample=True)
class Chance:
    """A router that knows nothing: uniform scores of tokens and layers. seed: another seed, another draw."""

    seed: int = 0
    protect: tuple[int, ...] = (0, 1, -1)

    @hookimpl
    def protected_layers(self, shape: ModelShape) -> frozenset[int]:
        """Layers that run for every sample, as with PAR."""
        return frozenset(layer % shape.layers for layer in self.protect)

    @hookimpl
    def route(self, visual: Tensor, seed: int, shape: ModelShape) -> Route:
        """Scores of one sample: of its positions, (S,), and of the layers, (N,)."""
        drawn = torch.rand(len(visual) + shape.layers, generator=_generator(seed, self.seed)).to(visual.device)
        return Route(drawn[: len(visual)], drawn[len(visual) :])


def registry() -> Registry:
    """What the installed plugins register, and these two."""
    signed = plugins.registry().signed("par-study", "the PAR study")
    signed.strategy("noisy_attention", f"{__name__}:NoisyAttention", summary="FastV's scores, disturbed")
    signed.strategy("chance", f"{__name__}:Chance", summary="random tokens and random layers")
    return signed
