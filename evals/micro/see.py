"""Stage 1, see: every patch feature learns to spell the noun, color and place it shows."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from .compose import GRID, Scene, patch_owner
from .lexicon import COLOR_NAMES, HEIGHTS, NOUNS, SIDES
from .model import VISION_WIDTH, WORDS, word_vectors

SHARPNESS = 12.0  # logits per unit of alignment
SETTLE_FROM = 0.5  # share of the stage after which the features' lengths are settled
BACKGROUND = 6.0  # a noun must align by more than half a unit to beat "nothing"


class SeeLoss(nn.Module):
    """Patch losses against the word vectors, and multi-label losses that give the CLS token its job."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("words", word_vectors(), persistent=False)
        self.heads = nn.ModuleList(nn.Linear(VISION_WIDTH, len(NOUNS)) for _ in range(2))
        column = torch.arange(GRID).repeat(GRID) * 2 // GRID
        row = torch.arange(GRID).repeat_interleave(GRID) * 2 // GRID
        self.register_buffer("side", column, persistent=False)
        self.register_buffer("height", row, persistent=False)

    def _settle(self, emitted: Tensor, batch: dict[str, Tensor], shown: Tensor) -> Tensor:
        """Squared distance of the features to the plain sum of the word vectors they should spell.

        The softmax losses leave the length and the unused directions free; left alone they grow to several
        times the words' own length, and the decoder would have to find the words in that noise.
        """
        parts = [
            F.one_hot(batch["noun"], len(NOUNS) + 1)[..., :-1],
            F.one_hot(batch["color"], len(COLOR_NAMES)) * shown[..., None],
            *(0.5 * F.one_hot(p, 2).expand(len(shown), -1, -1) for p in (self.side, self.height)),
        ]
        wanted = torch.cat([p.float() for p in parts], -1) @ self.words
        error = (emitted.float() - wanted).square().sum(-1)
        return error[shown].mean() + error[~shown].mean()

    def forward(
        self, model: LlavaForConditionalGeneration, batch: dict[str, Tensor], progress: float
    ) -> tuple[Tensor, dict[str, float]]:
        """Returns the loss and the accuracies of nouns and colors on patches that show something."""
        seen = model.model.vision_tower(batch["pixels"], output_hidden_states=True)
        features = seen.hidden_states[-2]
        emitted = model.model.multi_modal_projector(features[:, 1:])
        words = emitted @ self.words.T.to(features.dtype)
        parts = (words.float() * SHARPNESS).split([len(NOUNS), len(COLOR_NAMES), len(SIDES), len(HEIGHTS)], -1)
        noun = F.pad(parts[0], (0, 1), value=BACKGROUND)
        shown = batch["noun"] < len(NOUNS)
        B = len(noun)
        loss = F.cross_entropy(noun.flatten(0, 1), batch["noun"].flatten())
        loss = loss + F.cross_entropy(noun[shown], batch["noun"][shown])
        loss = loss + F.cross_entropy(parts[1][shown], batch["color"][shown])
        for part, target in ((parts[2], self.side), (parts[3], self.height)):
            loss = loss + 0.3 * F.cross_entropy(part.flatten(0, 1), target.repeat(B))
        settle = self._settle(emitted, batch, shown)
        if progress >= SETTLE_FROM:
            loss = loss + 0.2 * settle
        for head, summary in zip(self.heads, (features[:, 0], seen.pooler_output), strict=True):
            loss = loss + 2.0 * F.binary_cross_entropy_with_logits(head(summary.float()), batch["present"])
        right = noun.argmax(-1) == batch["noun"]
        accuracy = {
            "settle": settle.item(),
            "noun": right[shown].float().mean().item(),
            "background": right[~shown].float().mean().item(),
            "color": (parts[1].argmax(-1) == batch["color"])[shown].float().mean().item(),
            "side": (parts[2].argmax(-1) == self.side).float().mean().item(),
        }
        return loss, accuracy


def pixels(scenes: list[Scene], dtype: torch.dtype) -> Tensor:
    """Normalised images ``[B, 3, 168, 168]``, as the shipped image processor makes them (mean and std 0.5)."""
    images = torch.from_numpy(np.stack([s.image for s in scenes])).permute(0, 3, 1, 2)
    return (images.float() / 127.5 - 1).to(dtype)


def see_batch(scenes: list[Scene], dtype: torch.dtype) -> dict[str, Tensor]:
    """Pixels and targets: noun and color per patch (int64 ``[B, 144]``), nouns present (float ``[B, 48]``)."""
    noun = np.full((len(scenes), GRID * GRID), len(NOUNS), np.int64)
    color = np.zeros_like(noun)
    present = np.zeros((len(scenes), len(NOUNS)), np.float32)
    for row, shown in enumerate(scenes):
        owner = patch_owner(shown)
        ids = np.array([NOUNS.index(t.noun) for t in shown.objects] + [len(NOUNS)])
        hues = np.array([COLOR_NAMES.index(t.color) for t in shown.objects] + [0])
        noun[row], color[row] = ids[owner], hues[owner]
        present[row, ids[:-1]] = 1
    arrays = {"noun": noun, "color": color, "present": present}
    return {"pixels": pixels(scenes, dtype)} | {k: torch.from_numpy(v) for k, v in arrays.items()}


assert len(WORDS) == len(NOUNS) + len(COLOR_NAMES) + len(SIDES) + len(HEIGHTS)
