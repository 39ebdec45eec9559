"""prunekit-micro: a small, real LLaVA model with its scenes, training recipe and benchmark."""

from __future__ import annotations

from pathlib import Path

__all__ = ["model_path"]


def model_path() -> Path:
    """Folder of the shipped model, ready for `from_pretrained` (weights, tokenizer, processor, card)."""
    return Path(__file__).resolve().parent / "weights"
