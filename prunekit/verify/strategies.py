"""The strategies that proofs prune with, through the hooks that everyone uses.

They stand here, not among the built-in ones, so that an installation that has or loads none of those proves as much.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from prunekit.hookspecs import hookimpl
from prunekit.registry import Registry
from prunekit.strategy.decisions import LayerAction, LayerPlan, Owners
from prunekit.strategy.declare import strategy
from prunekit.strategy.decoder_requests import Rows
from prunekit.strategy.sites import Site, Sites

DRAWN, MERGED, ATTENDED, WITHOUT = "verify.drawn", "verify.merged", "verify.attended", "verify.without"
ACTIONS = {"layer": LayerAction.SKIP, "attention": LayerAction.SKIP_ATTENTION, "mlp": LayerAction.SKIP_MLP}


@strategy(per_sample=True, sites=Sites(tower=True, pixels=True))
class Drawn:
    """Keep visual tokens at random."""

    @hookimpl
    def score_tokens(self, valid: Tensor, seed: int) -> Tensor:
        """Uniform scores, float (V,), another draw for each sample."""
        return torch.rand(len(valid), generator=torch.Generator().manual_seed(seed)).to(valid.device)


@strategy(per_sample=True)
class Merged:
    """Keep visual tokens at random, and merge the others into the first of them."""

    @hookimpl
    def score_tokens(self, valid: Tensor, seed: int) -> Tensor:
        """Uniform scores, float (V,)."""
        return torch.rand(len(valid), generator=torch.Generator().manual_seed(seed)).to(valid.device)

    @hookimpl
    def merge_tokens(self, keep: Tensor) -> Owners:
        """Kept tokens own themselves, the first of them those that are dropped."""
        own = torch.arange(len(keep), device=keep.device)
        return Owners(torch.where(keep, own, keep.int().argmax()))


@strategy(
    sites=Sites(default=Site(2), encoder=False, lowest=1),
    inputs={"attention": Rows(layer="previous", queries="last", heads="mean")},
)
class Attended:
    """Keep the visual tokens that the last prompt token attends to most in the layer before."""

    @hookimpl
    def score_tokens(self, attention: Tensor) -> Tensor:
        """The attention itself, (B, V)."""
        return attention


@strategy()
class Without:
    """Leave out decoder layers. layers: their numbers. what: the whole layer, its attention or its MLP."""

    layers: tuple[int, ...]
    what: Literal["layer", "attention", "mlp"] = "layer"

    @hookimpl
    def plan_layers(self) -> LayerPlan:
        """The same plan for every sample."""
        return LayerPlan(dict.fromkeys(self.layers, ACTIONS[self.what]))


def with_own(registry: Registry) -> Registry:
    """`registry`, to which these strategies are added; their names, with a dot, are in nobody's way."""
    own = registry.signed("verify", "prunekit")
    for name, cls in ((DRAWN, Drawn), (MERGED, Merged), (ATTENDED, Attended), (WITHOUT, Without)):
        own.strategy(name, f"{__name__}:{cls.__name__}", summary=str(cls.__doc__).partition("\n")[0])
    return registry
