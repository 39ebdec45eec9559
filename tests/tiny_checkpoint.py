"""A complete tiny model on disk, and pictures for it."""

from __future__ import annotations

from pathlib import Path


def save(folder: Path, layers: int = 10) -> Path:
    """As `prunekit.testing.save_tiny_model`, which is imported only now."""
    from prunekit.testing import save_tiny_model

    return save_tiny_model(folder, layers)


def picture(path: Path, seed: int = 0) -> Path:
    """Write a small noisy picture."""
    import random

    from PIL import Image

    Image.frombytes("RGB", (20, 14), random.Random(seed).randbytes(3 * 20 * 14)).save(path)
    return path
