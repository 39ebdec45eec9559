"""Stage 1, see: visual tokens learn to name what they show, colors and places at once, names inside the decoder.

The losses also stay on, at a smaller weight, in the later stages: patches are plentiful supervision.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from prunekit_evals.micro.compose import GRID, Scene, patch_owner
from prunekit_evals.micro.lexicon import COLOR_NAMES, HEIGHTS, SIDES
from prunekit_evals.studies.micro.model import NAMES, SEEING, VISION_WIDTH, WORDS, word_vectors
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

SHARPNESS = 12.0  # logits per unit of alignment
BACKGROUND = 6.0  # a name must align by more than half a unit to beat "nothing"
SIZES = (len(NAMES), len(COLOR_NAMES), len(SIDES), len(HEIGHTS))


@dataclass(frozen=True)
class Shown:
    """What the patches show: name and color int64 `[B, 144]` (`len(NAMES)`: nothing), names present `[B, 56]`."""

    name: Tensor
    color: Tensor
    present: Tensor

    def kept(self, keep: Tensor) -> Shown:
        """Of the patches `keep`, int64 `[B, K]`."""
        return Shown(self.name.gather(1, keep), self.color.gather(1, keep), self.present)


def shown(scenes: list[Scene]) -> Shown:
    name = np.full((len(scenes), GRID * GRID), len(NAMES), np.int64)
    color = np.zeros_like(name)
    present = np.zeros((len(scenes), len(NAMES)), np.float32)
    for row, one in enumerate(scenes):
        owner = patch_owner(one)
        ids = np.array([NAMES.index(t.noun) for t in one.things] + [len(NAMES)])
        hues = np.array([COLOR_NAMES.index(t.color) for t in one.things] + [0])
        name[row], color[row] = ids[owner], hues[owner]
        present[row, ids[:-1]] = 1
    return Shown(*map(torch.from_numpy, (name, color, present)))


class SeeLoss(nn.Module):
    """Losses on patches against the word vectors, and multi-label losses that give the CLS token its job."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("words", word_vectors(), persistent=False)
        self.heads = nn.ModuleList(nn.Linear(VISION_WIDTH, len(NAMES)) for _ in range(2))
        patches = torch.arange(GRID * GRID)
        self.register_buffer("side", patches % GRID * 2 // GRID, persistent=False)
        self.register_buffer("height", patches // GRID * 2 // GRID, persistent=False)

    def _logits(self, states: Tensor) -> tuple[Tensor, ...]:
        return ((states @ self.words.T.to(states.dtype)).float() * SHARPNESS).split(SIZES, -1)

    def early(self, emitted: Tensor, about: Shown) -> tuple[Tensor, dict[str, float]]:
        """What the projector must emit: color and place. `emitted` are all patches, `[B, 144, H]`."""
        _, color, side, height = self._logits(emitted)
        on_thing = about.name < len(NAMES)
        loss = F.cross_entropy(color[on_thing], about.color[on_thing])
        for part, target in ((side, self.side), (height, self.height)):
            loss = loss + 0.3 * F.cross_entropy(part.flatten(0, 1), target.repeat(len(emitted)))
        right = (color.argmax(-1) == about.color)[on_thing].float().mean().item()
        return loss, {"color": right}

    def late(self, states: Tensor, about: Shown, keep: Tensor, settle: float) -> tuple[Tensor, dict[str, float]]:
        """What the visual states `[B, K, H]` of the patches `keep` must name before decoder layer `SEEING`."""
        parts = self._logits(states)
        about = about.kept(keep)
        name = F.pad(parts[0], (0, 1), value=BACKGROUND)
        on_thing = about.name < len(NAMES)
        loss = F.cross_entropy(name.flatten(0, 1), about.name.flatten())
        if on_thing.any():
            loss = loss + F.cross_entropy(name[on_thing], about.name[on_thing])
            loss = loss + 0.5 * F.cross_entropy(parts[1][on_thing], about.color[on_thing])
        distance = self._distance(states, about, keep, on_thing).mean()
        if settle:
            loss = loss + settle * distance
        right = (name.argmax(-1) == about.name).float()
        named, empty = right[on_thing].mean().item(), right[~on_thing].mean().item()
        return loss, {"settle": distance.item(), "name": named, "empty": empty}

    def _distance(self, states: Tensor, about: Shown, keep: Tensor, on_thing: Tensor) -> Tensor:
        """Squared distances `[B, K]` of the states to the plain sum of the word vectors that they should name.

        The softmax losses leave the length and the unused directions free; left alone they grow to several
        times the words' own length, and the later layers would have to find the words in that noise.
        """
        wanted = [
            F.one_hot(about.name, len(NAMES) + 1)[..., :-1],
            F.one_hot(about.color, len(COLOR_NAMES)) * on_thing[..., None],
            *(0.5 * F.one_hot(place[keep], 2) for place in (self.side, self.height)),
        ]
        target = torch.cat([w.float() for w in wanted], -1) @ self.words
        return (states.float() - target).square().sum(-1)

    def held(self, states: list[Tensor], about: Shown, keep: Tensor) -> Tensor:
        """Mean distance of the visual states of later layers to the same words.

        Nothing else asks anything of them: without this a later layer once added a constant a hundred times as long
        as the words to every visual token, and the layers after it could read nothing.
        """
        about = about.kept(keep)
        on_thing = about.name < len(NAMES)
        return torch.stack([(self._distance(s, about, keep, on_thing) + 1e-3).sqrt().mean() for s in states]).mean()

    def summary(self, features: Tensor, pooled: Tensor, about: Shown) -> Tensor:
        """Names present, from the CLS token in the features' layer `[B, 128]` and after the last."""
        logits = [head(cls.float()) for head, cls in zip(self.heads, (features, pooled), strict=True)]
        return sum((F.binary_cross_entropy_with_logits(x, about.present) for x in logits), torch.zeros(()))


class Recorder:
    """Keeps the states `[B, S, H]` before every decoder layer from `first` on, by layer, of the latest forward."""

    def __init__(self, model: LlavaForConditionalGeneration, first: int = SEEING) -> None:
        self.states: dict[int, Tensor] = {}
        for number, layer in enumerate(model.model.language_model.layers):
            if number + 1 >= first:
                layer.register_forward_hook(partial(self._keep, number + 1))

    def _keep(self, number: int, module: nn.Module, args: tuple[object, ...], out: Tensor | tuple[Tensor, ...]) -> None:
        self.states[number] = out if isinstance(out, Tensor) else out[0]

    def visual(self, lead: int, count: int) -> list[Tensor]:
        """The visual tokens' states before layer `SEEING` and the later ones; what was recorded is forgotten."""
        visual = [self.states[n][:, lead : lead + count] for n in sorted(self.states) if n >= SEEING]
        self.states = {}
        return visual


assert len(WORDS) == sum(SIZES)
