"""prunekit-smol: a real LLaVA on a pretrained decoder of thirty layers, assembled from what ships and one package."""

from __future__ import annotations

from pathlib import Path

__all__ = ["model_path"]


def model_path() -> Path:
    """Folder of the model, ready for `from_pretrained`; the first call assembles it, in seconds, without a network.

    Raises InputError where the package with the language model is not installed or not the known one, or where the
    cache cannot be written.
    """
    from prunekit_evals.smol.store import assembled

    return assembled()
