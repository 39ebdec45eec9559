"""Strategies of the study alone, brought in through the same hooks as anyone's (`plugin.py`)."""

from __future__ import annotations

import torch
from prunekit_strategies.par.strategy import Par
from torch import Tensor

from prunekit import ModelShape, Route, Rows, Site, Sites, hookimpl, strategy


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


@strategy(sites=Sites(default=Site(2)), per_sample=True)
class AnotherQuestion(Par):
    """PAR whose router is shown what followed the image of the sample before, in place of this sample's own question.

    A control: what it loses is what the question is worth to the router. The first sample of a process sees its own,
    and so does one that asks what the one before asked; which samples follow each other, the order of the data says.
    """

    @hookimpl
    def route(self, embeds: Tensor, visual: Tensor, valid: Tensor, shape: ModelShape) -> Route:
        """Scores of one sample: of its positions, (S,), and of the layers, (N,)."""
        end = int(visual.nonzero()[-1]) + 1
        own = embeds[end:]
        other = LAST.get(shape.hidden, own)
        LAST[shape.hidden] = own.detach().clone()
        shown = torch.cat([embeds[:end], other.to(embeds)])
        where = torch.cat([visual[:end], visual.new_zeros(len(other))])
        every = torch.cat([valid[:end], valid.new_ones(len(other))])
        tokens, layers = self._router(shape, embeds)(shown[None], where[None], every[None])
        scores = tokens.new_zeros(len(embeds))
        scores[:end] = tokens[0, :end]
        return Route(scores, layers[0])


LAST: dict[int, Tensor] = {}  # by hidden size what followed the image of the last sample, (T, H)
