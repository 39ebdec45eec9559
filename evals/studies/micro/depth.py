"""Decoder layers left out of a training step, so that a model with a layer less still answers.

Any layer may be hit, the same one for the whole batch; nothing is learned about which.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from torch import nn
from transformers import LlavaForConditionalGeneration

SHARE = 0.2  # of the steps
FROM = 0.9  # progress of stage 2 from which layers are left out; in stage 3 they always may be


def drawn(rng: np.random.Generator, progress: float, layers: int) -> int | None:
    """The layer to leave out, or None."""
    if progress < FROM or rng.random() >= SHARE:
        return None
    return int(rng.integers(layers))


@contextmanager
def without(model: LlavaForConditionalGeneration, *layers: int | None) -> Iterator[None]:
    """The decoder without some layers; the others keep their numbers."""
    decoder = model.model.language_model
    whole = decoder.layers
    decoder.layers = nn.ModuleList(layer for i, layer in enumerate(whole) if i not in layers)
    try:
        yield
    finally:
        decoder.layers = whole
