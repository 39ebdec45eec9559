"""References that are wrong on purpose, each in one small way: the checks must notice all of them."""

from __future__ import annotations

import torch

from prunekit.strategy.decisions import LayerAction
from prunekit.verify.oracle import MaskedReference
from prunekit.verify.reported import closed


class Renumbered(MaskedReference):
    """Wrong on purpose: positions close up after tokens have left."""

    def positions(self, layer, tokens):
        return closed(super().positions(layer, tokens), self.tables.entering[layer], self.present)


class OneLayerLate(MaskedReference):
    """Wrong on purpose: tokens leave one layer later than they should."""

    def mask(self, layer, tokens):
        return super().mask(max(layer - 1, 0), tokens)


class PadsSeen(MaskedReference):
    """Wrong on purpose: padding is attended."""

    def mask(self, layer, tokens):
        seen, bias = super().mask(layer, tokens)
        pads = torch.zeros(bias.shape, dtype=torch.bool)
        pads[:, : self.present.shape[1]] = ~self.present
        return seen | (pads[:, None] & torch.ones(tokens, tokens, dtype=torch.bool).tril()), bias


class AllAlike(MaskedReference):
    """Wrong on purpose: every key stands for a token and a bit more."""

    def mask(self, layer, tokens):
        seen, bias = super().mask(layer, tokens)
        bias[:, : self.present.shape[1]] += 0.1 * self.tables.entering[layer]
        return seen, bias


class Uncropped(MaskedReference):
    """Wrong on purpose: decoding still sees what a crop, or the end of the prefill, took away."""

    def mask(self, layer, tokens):
        seen, bias = super().mask(layer, tokens)
        length = self.present.shape[1]
        seen[:, length:, :length] |= self.tables.entering[layer][:, None]
        return seen, bias


class Unfilled(MaskedReference):
    """Wrong on purpose: layers whose KV is filled, and nothing more, hold none."""

    def mask(self, layer, tokens):
        seen, bias = super().mask(layer, tokens)
        for row, plan in enumerate(self.tables.plans):
            if plan[layer] is LayerAction.FILL_KV:
                seen[row, self.present.shape[1] :, : self.present.shape[1]] = False
        return seen, bias
