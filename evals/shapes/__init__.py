"""Configs of published models, without weights: what `prunekit cost` and `prunekit bench --random` need of them.

Each folder holds a `config.json` and a `preprocessor_config.json` with the values of the checkpoint that docs/cost.md
names, as far as they decide what is computed; what is not written has the default of transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

NAMES = (
    "gemma-3-12b", "internvl3-8b", "llava-1.5-13b", "llava-1.5-7b", "llava-next-7b", "llava-onevision-7b",
    "qwen2.5-vl-7b", "qwen3-vl-8b", "qwen3.5-9b",
)  # fmt: skip


def attribute(name: str) -> str:
    """What the function of a model is called in this module: `llava_1_5_7b` of `llava-1.5-7b`."""
    return name.replace("-", "_").replace(".", "_")


def folder(name: str) -> Path:
    """The folder with the configs of a model, one of `NAMES`."""
    return Path(__file__).resolve().parent / name


def __getattr__(wanted: str) -> Callable[[], Path]:
    for name in NAMES:
        if attribute(name) == wanted:
            return partial(folder, name)
    raise AttributeError(f"module '{__name__}' has no attribute '{wanted}'")
