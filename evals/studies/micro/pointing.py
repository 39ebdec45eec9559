"""A scaffold for the first part of stage 2: words are told which patches they are about.

Left to find by itself that the word "dog" should look at the dog, an earlier decoder was still on a plateau after
500 steps. For a while, an auxiliary loss therefore says to two heads of a layer what words of a question attend to:

- layer 1: from colors and places to the patches that show them, which can be seen there already;
- layers 3 and 4, the first that can know names: from all words to what they name, and from a name that is not in the
  image to the tokens before the image;
- layer 5: in questions of several hops, from a name to the other things of its color.

The loss fades to nothing, as that of `naming` does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from prunekit_evals.micro.compose import Scene, patch_owner
from prunekit_evals.micro.lexicon import COLOR_NAMES, HEIGHTS, SIDES
from prunekit_evals.micro.packing import Packed
from prunekit_evals.studies.micro.model import NAMES
from prunekit_evals.studies.micro.tokenizer import single_tokens
from torch import Tensor
from transformers import PreTrainedTokenizerFast

LAYERS = {1: ("early",), 3: ("named", "absent"), 4: ("named", "absent"), 5: ("hops",)}
HOPPED = ("same_color", "where_same", "kind_same", "read_like", "hint_like")
HEADS = 2
WEIGHT = 0.3


def scaffold(progress: float) -> float:
    """The weight of the auxiliary losses: full to half of the stage, nothing from four fifths on."""
    return WEIGHT * float(np.clip((0.8 - progress) / 0.3, 0, 1))


class Words:
    """Token ids of the words that name things, colors and places."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.names = single_tokens(tokenizer, NAMES)
        self.colors = single_tokens(tokenizer, COLOR_NAMES)
        self.heights = single_tokens(tokenizer, HEIGHTS)
        self.sides = single_tokens(tokenizer, SIDES)

    def about(self, ids: np.ndarray, shown: Scene, names: bool = True) -> np.ndarray:
        """Which things each token names: bool `[len(ids), len(things)]`; a place is "top left" in full."""
        named = np.zeros((len(ids), len(shown.things)), bool)
        before = np.concatenate([[-1], ids[:-1]])
        for i, thing in enumerate(shown.things):
            if names:
                named[:, i] |= ids == self.names[NAMES.index(thing.noun)]
            named[:, i] |= ids == self.colors[COLOR_NAMES.index(thing.color)]
            height = before == self.heights[HEIGHTS.index(thing.height)]
            named[:, i] |= height & (ids == self.sides[SIDES.index(thing.side)])
        return named


@dataclass(frozen=True)
class Aim:
    """Question tokens with a target, int64 `[N, 2]` (scene, place in the row), and where they should look among
    the prefix, bool `[N, lead + K]`."""

    at: Tensor
    columns: Tensor


class Pointing:
    """Sees the attention of one forward and keeps the loss: minus the log of the mass where it should be."""

    def __init__(self, words: Words, scenes: list[Scene], keep: Tensor, packed: Packed, lead: int) -> None:
        self.losses: list[Tensor] = []
        ids, kept, hopped = packed.ids.numpy(), keep.numpy(), _hopped(packed)
        wanted = [_columns(words, shown, ids[b], kept[b], hopped[b], lead) for b, shown in enumerate(scenes)]
        self.aims = {kind: _aim([columns[kind] for columns in wanted]) for kind in ("early", "named", "absent", "hops")}
        sizes = [count * length for count, length in packed.groups]
        ends = np.cumsum(sizes)
        self.spans = [(int(end) - size, int(end)) for end, size in zip(ends, sizes, strict=True)]

    def __call__(self, layer: int, group: int, seen: Tensor) -> None:
        start, end = self.spans[group]
        for kind in LAYERS.get(layer, ()):
            aim = self.aims.get(kind)
            if aim is None:
                continue
            inside = (aim.at[:, 1] >= start) & (aim.at[:, 1] < end)
            if inside.any():
                b, s = aim.at[inside].unbind(1)
                mass = seen[b, :HEADS, s - start].float() * aim.columns[inside][:, None]
                self.losses.append(-(mass.sum(-1) + 1e-4).log().mean())

    def loss(self) -> Tensor:
        """Mean over the layers, kinds and groups with a target; zero without any."""
        return torch.stack(self.losses).mean() if self.losses else torch.zeros(())


def _hopped(packed: Packed) -> np.ndarray:
    """Which tokens belong to a question of several hops: bool `[B, S]`."""
    lengths = [length for count, length in packed.groups for _ in range(count)]
    return np.stack([np.repeat([f in HOPPED for f in families], lengths) for families in packed.families])


def _columns(words: Words, shown: Scene, ids: np.ndarray, kept: np.ndarray, hopped: np.ndarray, lead: int):
    """For each kind, where each token should look: bool `[S, lead + K]`; nowhere: it has no target."""
    owner = patch_owner(shown)[kept]
    patches = np.stack([owner == i for i in range(len(shown.things))]).astype(np.int64)
    named = words.about(ids, shown)
    colors = np.array([t.color for t in shown.things])
    names = named & np.isin(ids, words.names)[:, None]
    kin = (colors[:, None] == colors) & ~np.eye(len(colors), dtype=bool)
    away = (names & hopped[:, None]).astype(np.int64) @ kin.astype(np.int64) > 0
    shows = {"early": words.about(ids, shown, False), "named": named, "hops": away}
    columns = {
        kind: np.pad(things.astype(np.int64) @ patches > 0, ((0, 0), (lead, 0))) for kind, things in shows.items()
    }
    missing = np.isin(ids, words.names) & ~named.any(-1)
    columns["absent"] = missing[:, None] & (np.arange(lead + len(kept)) < lead)
    return columns


def _aim(columns: list[np.ndarray]) -> Aim:
    rows, targets = [], []
    for b, wanted in enumerate(columns):
        at = wanted.any(-1).nonzero()[0]
        rows.append(np.stack([np.full_like(at, b), at], 1))
        targets.append(wanted[at])
    return Aim(torch.from_numpy(np.concatenate(rows)), torch.from_numpy(np.concatenate(targets)))
