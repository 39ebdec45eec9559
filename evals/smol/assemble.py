"""Make the model folder of prunekit-smol: base weights with adapters merged, tower, projector, processor, configs.

Nothing of it needs PyTorch or transformers, so that the folder is the same whatever versions of them are installed.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from prunekit_evals.smol import base
from prunekit_evals.smol.adapters import merge
from safetensors.numpy import load_file, save_file

__all__ = ["PARTS", "TRAINED", "write"]

PARTS = Path(__file__).resolve().parent / "parts"
TRAINED = "trained.safetensors"  # what training made: tower, projector and adapters, float16


def write(gguf: Path, folder: Path) -> None:
    """Write the model into the new folder `folder`, 550 MB: all weights in float32, in which they were summed.

    gguf: the file of the language model, already checked. Raises OSError where the folder cannot be written.
    """
    weights, tokenizer = base.read(gguf)
    trained = load_file(PARTS / TRAINED)
    merge(weights, trained)
    tensors = {f"language_model.model.{name}": value for name, value in weights.items()}
    tensors |= {n: v.astype(np.float32) for n, v in trained.items() if not n.startswith("adapters.")}
    folder.mkdir()
    for part in sorted(PARTS.iterdir()):
        if part.name != TRAINED:
            shutil.copyfile(part, folder / part.name)
    tokenizer.save(str(folder / "tokenizer.json"))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors files start private
