"""Baseline: inside the vision tower each dropped token joins the kept one before it."""

import torch
from torch import Tensor

from prunekit import Owners, Site, Sites, hookimpl, strategy


@strategy(sites=Sites(tower=True, encoder=False, decoder=False, default=Site.parse("vision.0")), per_sample=True)
class Blend:
    """Tokens that differ most from the one before them stay."""

    @hookimpl
    def score_tokens(self, hidden: Tensor) -> Tensor:
        """Float (V,)."""
        states = hidden.float()
        return (states - states.roll(1, 0)).norm(dim=-1)

    @hookimpl
    def merge_tokens(self, keep: Tensor) -> Owners:
        """Those in front of the first kept one join that."""
        here = torch.arange(len(keep), device=keep.device)
        before = torch.where(keep, here, -1).cummax(0).values
        return Owners(torch.where(before < 0, keep.int().argmax(), before))
