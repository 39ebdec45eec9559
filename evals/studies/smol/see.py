"""What a patch should say: targets made of the language model's own word embeddings, and the losses towards them.

A visual token is to lie where the embedding of its noun lies, shifted a little by color and place. The noun must
dominate: with all parts at one weight the language model learned nothing from such tokens for 1,800 questions, with a
dominant noun it did within 30 steps (`docs/decisions/smol-recipe.md`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from prunekit_evals.micro.compose import GRID, TOKENS, Scene, patch_owner
from prunekit_evals.micro.lexicon import COLOR_NAMES, HEIGHTS, NOUNS, SIDES, SIGNS
from prunekit_evals.studies.smol.tower import VISION_WIDTH
from tokenizers import Tokenizer
from torch import Tensor, nn

NAMES: tuple[str, ...] = (*NOUNS, *SIGNS)
NOTHING = len(NAMES)  # the class of a patch that shows background
SIGN, COLOR, PLACE = 0.5, 0.65, 0.3  # weights beside the noun's 1


@dataclass(frozen=True)
class Labels:
    """Classes of each patch, int64 `[B, 144]`: name (`NOTHING`: background), color, side, height.

    Side and height are those of the thing that the patch belongs to, or the patch's own on background.
    """

    name: Tensor
    color: Tensor
    side: Tensor
    height: Tensor

    def to(self, device: torch.device) -> Labels:
        return Labels(*(t.to(device) for t in (self.name, self.color, self.side, self.height)))

    @classmethod
    def of(cls, packed: np.ndarray) -> Labels:
        return cls(*torch.from_numpy(packed.astype(np.int64)).unbind(1))


def labels(scenes: Sequence[Scene]) -> np.ndarray:
    """The classes of `Labels`, uint8 `[B, 4, 144]`."""
    patch = np.arange(TOKENS)
    packed = np.empty((len(scenes), 4, TOKENS), np.uint8)
    for row, shown in enumerate(scenes):
        owner = patch_owner(shown)
        on = owner >= 0
        packed[row, :2] = [[NOTHING], [0]]
        packed[row, 2:] = patch % GRID * 2 // GRID, patch // GRID * 2 // GRID
        classes = np.array([
            (NAMES.index(t.noun), COLOR_NAMES.index(t.color), SIDES.index(t.side), HEIGHTS.index(t.height))
            for t in shown.things
        ])  # fmt: skip
        packed[row][:, on] = classes[owner[on]].T
    return packed


class Target(nn.Module):
    """Where each patch should lie in the language model's embedding space."""

    def __init__(self, embed: Tensor, tokenizer: Tokenizer) -> None:
        """`embed`: `[49152, 576]`."""
        super().__init__()
        table = embed.float()
        middle = table.mean(0)

        def direction(word: str) -> Tensor:
            return table[tokenizer.encode(f" {word}", add_special_tokens=False).ids].mean(0) - middle

        names = [direction(n) + (SIGN * direction("sign") if n in SIGNS else 0) for n in NAMES]
        self.register_buffer("middle", middle, persistent=False)
        self.register_buffer("names", torch.stack([*names, torch.zeros_like(middle)]), persistent=False)
        beside = (("colors", COLOR_NAMES, COLOR), ("sides", SIDES, PLACE), ("heights", HEIGHTS, PLACE))
        for kind, words, weight in beside:
            self.register_buffer(kind, weight * torch.stack([direction(w) for w in words]), persistent=False)

    def forward(self, about: Labels) -> Tensor:
        """Float `[B, 144, 576]`."""
        on = (about.name < NOTHING)[..., None]
        placed = self.sides[about.side] + self.heights[about.height]
        return self.middle + self.names[about.name] + self.colors[about.color] * on + placed


class SeeLoss(nn.Module):
    """Heads that name patches from the tower's features, the distance to the target, and work for the CLS token."""

    parts = {"name": NOTHING + 1, "color": len(COLOR_NAMES), "side": len(SIDES), "height": len(HEIGHTS)}

    def __init__(self, embed: Tensor, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.target = Target(embed, tokenizer)
        self.patch = nn.Linear(VISION_WIDTH, sum(self.parts.values()))
        self.summary = nn.ModuleList(nn.Linear(VISION_WIDTH, len(NAMES)) for _ in range(2))

    def forward(
        self, visual: Tensor, features: Tensor, pooled: Tensor, about: Labels, near: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss with weight `near` on the distance, and shares of patches of things that are named right."""
        logits = self.patch(features[:, 1:]).float().split(tuple(self.parts.values()), -1)
        on = about.name < NOTHING
        weight = on.float() / on.sum()
        name = F.cross_entropy(logits[0].flatten(0, 1), about.name.flatten(), reduction="none").view_as(weight)
        loss = name.mean() + 1.5 * (name * weight).sum()
        right = {"name": ((logits[0].argmax(-1) == about.name) * weight).sum()}
        sign = on & (about.name >= len(NOUNS))
        right["sign"] = ((logits[0].argmax(-1) == about.name) & sign).sum() / sign.sum().clamp(min=1)
        for kind, guess, share in zip(("color", "side", "height"), logits[1:], (0.7, 0.2, 0.2), strict=True):
            truth = getattr(about, kind)
            each = F.cross_entropy(guess.flatten(0, 1), truth.flatten(), reduction="none").view_as(weight)
            loss = loss + share * (each * weight).sum()
            right[kind] = ((guess.argmax(-1) == truth) * weight).sum()
        wanted = self.target(about)
        away = (visual.float() - wanted).square().sum(-1) / (wanted - self.target.middle).square().sum(-1).mean()
        right["distance"] = (away * weight).sum()
        present = torch.zeros(len(visual), NOTHING + 1, device=visual.device).scatter_(1, about.name, 1.0)[:, :-1]
        for head, state in zip(self.summary, (features[:, 0], pooled), strict=True):
            loss = loss + F.binary_cross_entropy_with_logits(head(state).float(), present)
        return loss + near * (away.mean() + right["distance"]), right
