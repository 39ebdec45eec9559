"""Which visual tokens a training step keeps: patterns that know nothing of the image."""

from __future__ import annotations

import numpy as np
from prunekit_evals.micro.compose import GRID

PATTERNS = ("random", "blocks", "stride")


def kept(rng: np.random.Generator, batch: int, count: int, pattern: str) -> np.ndarray:
    """Sorted indices of `count` of the 144 patches for every image; int64 `[batch, count]`.

    `blocks` keeps whole 2x2 to 4x4 blocks of patches, `stride` every n-th token from a random phase.
    """
    total = GRID * GRID
    if pattern == "stride":
        phase = rng.random((batch, 1))
        return np.floor((np.arange(count) + phase) * total / max(count, 1)).astype(np.int64)
    noise = rng.random((batch, GRID, GRID))
    if pattern == "blocks":
        side = int(rng.integers(2, 5))
        cells = rng.random((batch, GRID // side, GRID // side)).repeat(side, 1).repeat(side, 2)
        noise = cells + 1e-3 * noise
    return np.sort(noise.reshape(batch, total).argsort(1)[:, :count], 1)
