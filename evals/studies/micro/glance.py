"""Stage 3, glance: where the answer begins, the decoder knows early what the image shows, whatever was asked.

Large LVLMs are first trained on captions, whose first word needs the contents of the image, which may be why their last
prompt token attends to things in early layers. A model that learns from questions alone has no reason to look before it
can name what it sees. So an auxiliary loss asks the state where an answer begins to name, before layer `EARLY`, the
names and colors of all things shown. Which tokens to attend to for that is not said. The loss fades to nothing, as that
of the other scaffolds does. Questions, drops and the other losses are those of the end of stage 2, and the rate begins
anew.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from prunekit_evals.micro.compose import TOKENS, Scene
from prunekit_evals.micro.lexicon import COLOR_NAMES
from prunekit_evals.micro.packing import IGNORE, Packed
from prunekit_evals.studies.micro.model import NAMES
from prunekit_evals.studies.micro.naming import SHARPNESS
from prunekit_evals.studies.micro.pointing import Pointing
from prunekit_evals.studies.micro.read import Cut, Read
from prunekit_evals.studies.micro.see import SIZES
from torch import Tensor

EARLY = 2


@dataclass(frozen=True)
class Contents:
    """What scenes show, as shares that sum to one: names `[B, 56]`, colors `[B, 6]`."""

    names: Tensor
    colors: Tensor

    @classmethod
    def of(cls, scenes: list[Scene]) -> Contents:
        """Of `B` scenes; what is shown twice, as a color of two things, counts once."""
        names, colors = torch.zeros(len(scenes), len(NAMES)), torch.zeros(len(scenes), len(COLOR_NAMES))
        for row, one in enumerate(scenes):
            names[row, [NAMES.index(t.noun) for t in one.things]] = 1.0
            colors[row, [COLOR_NAMES.index(t.color) for t in one.things]] = 1.0
        return cls(F.normalize(names, p=1), F.normalize(colors, p=1))

    def loss(self, states: Tensor, begins: Tensor, vectors: Tensor) -> Tensor:
        """Cross entropies of what `states [B, S, H]` name at `begins` (bool `[B, S]`) in `word_vectors`."""
        logits = F.normalize(states[begins].float(), dim=-1) @ vectors.T * SHARPNESS
        names, colors, *_ = logits.split(SIZES, -1)
        scene = begins.nonzero()[:, 0]
        return F.cross_entropy(names, self.names[scene]) + F.cross_entropy(colors, self.colors[scene])


def begins(labels: Tensor) -> Tensor:
    """The last token of each prompt, which predicts the first of its answer: bool like `labels [B, S]`."""
    answer = labels != IGNORE
    return answer & ~F.pad(answer, (1, 0))[:, :-1]


class Glance(Read):
    """As the end of stage 2, with another scaffold."""

    recorded = EARLY

    def age(self, progress: float) -> float:
        return 1.0

    def auxiliary(self, scenes: list[Scene], packed: Packed, cut: Cut, pointing: Pointing | None) -> dict[str, Tensor]:
        """Nothing where tokens are gone, or layer `EARLY - 1`: the contents may be out of reach."""
        asked = self.asked(packed)
        if EARLY not in asked or cut.keep.shape[1] < TOKENS:
            return {}
        return {"glance": Contents.of(scenes).loss(asked[EARLY], begins(packed.labels), self.see.words)}
