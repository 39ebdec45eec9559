"""Another scaffold of stage 2: what a word has found out must stand in its own state.

The decoder learned to look from a name to its patches, and to take a color from there, long before it took a place; and
to look from a name to the other thing of its color without saying which that was. So an auxiliary loss asks the state
of a name in a question to name the color and place of its thing before layer 5, and, in questions of several hops, the
other thing of its color before layer 7, with its place where that is asked for.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from prunekit_evals.micro.compose import Scene
from prunekit_evals.micro.lexicon import COLOR_NAMES, HEIGHTS, SIDES
from prunekit_evals.micro.packing import Packed
from prunekit_evals.studies.micro.model import NAMES
from prunekit_evals.studies.micro.pointing import HOPPED, Words
from prunekit_evals.studies.micro.see import SIZES
from torch import Tensor

SHARPNESS = 20.0
NOTHING = -100
KINDS = ("name", "color", "side", "height", "other", "there", "level")
FACTS, HOPS = 5, 7  # before these layers


def families(packed: Packed) -> np.ndarray:
    """The family of the question that each token belongs to, `[B, S]`."""
    lengths = [length for count, length in packed.groups for _ in range(count)]
    return np.stack([np.repeat(names, lengths) for names in packed.families])


def targets(words: Words, scenes: list[Scene], packed: Packed) -> dict[str, Tensor]:
    """For every token and kind the class to name, int64 `[B, S]`, or `NOTHING`."""
    ids, asked = packed.ids.numpy(), families(packed)
    classes = {kind: np.full(ids.shape, NOTHING) for kind in ("color", "side", "height", "other", "there", "level")}
    for b, shown in enumerate(scenes):
        for thing in shown.things:
            at = ids[b] == words.names[NAMES.index(thing.noun)]
            classes["color"][b, at] = COLOR_NAMES.index(thing.color)
            if thing.clear:
                classes["side"][b, at] = SIDES.index(thing.side)
                classes["height"][b, at] = HEIGHTS.index(thing.height)
            for wanted, hops in ((shown.signs, ("read_like",)), (shown.objects, HOPPED)):
                kin = [t for t in wanted if t.color == thing.color and t is not thing]
                here = at & np.isin(asked[b], hops) & ((asked[b] == "read_like") == (wanted is shown.signs))
                if len(kin) != 1:
                    continue
                classes["other"][b, here] = NAMES.index(kin[0].noun)
                if kin[0].clear:
                    here = here & (asked[b] == "where_same")
                    classes["there"][b, here] = SIDES.index(kin[0].side)
                    classes["level"][b, here] = HEIGHTS.index(kin[0].height)
    return {kind: torch.from_numpy(t) for kind, t in classes.items()}


def naming_loss(states: dict[int, Tensor], vectors: Tensor, wanted: dict[str, Tensor]) -> Tensor:
    """`states` of the questions by layer, `[B, S, H]`; `vectors` as of `word_vectors`."""
    losses = []
    for layer, kinds in ((FACTS, ("color", "side", "height")), (HOPS, ("other", "there", "level"))):
        if layer not in states:
            continue
        for kind in kinds:
            at = wanted[kind] != NOTHING
            if at.any():
                direction = F.normalize(states[layer][at].float(), dim=-1)
                split = (direction @ vectors.T).split(SIZES, -1)
                name, _, side, height = split
                parts = dict(zip(KINDS, (*split, name, side, height), strict=True))
                losses.append(F.cross_entropy(parts[kind] * SHARPNESS, wanted[kind][at]))
    return torch.stack(losses).sum() if losses else torch.zeros(())
