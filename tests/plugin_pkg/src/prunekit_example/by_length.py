"""Baseline: a router that keeps tokens like the text, and prefers early or late layers by the length of the text."""

import torch
from torch import Tensor

from prunekit import ModelShape, Route, Site, Sites, hookimpl, strategy


@strategy(sites=Sites(default=Site(1)), per_sample=True)
class ByLength:
    """Layers of a long text rank from the first to the last, of a short one the other way round."""

    long: int = 8

    @hookimpl
    def route(self, embeds: Tensor, text: Tensor, shape: ModelShape) -> Route:
        """Scores of the positions (S,) of one sample, and of the layers (N,)."""
        prompt = embeds.float()[text].mean(0, keepdim=True)
        order = torch.arange(shape.layers, device=embeds.device).float()
        likeness = torch.cosine_similarity(embeds.float(), prompt, dim=-1)
        return Route(tokens=likeness, layers=-order if int(text.sum()) > self.long else order)

    @hookimpl
    def protected_layers(self, shape: ModelShape):
        """The last layer always runs."""
        return (shape.layers - 1,)
