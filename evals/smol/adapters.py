"""The low-rank adapters of prunekit-smol: which matrices they change, and the sum of both."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from prunekit_evals.smol.base import HEADS, KV_HEADS, LAYERS, MLP, WIDTH

__all__ = ["KINDS", "merge"]

KEYS = KV_HEADS * WIDTH // HEADS
# Kind -> the modules whose rows it stacks, its outputs and its inputs.
KINDS: dict[str, tuple[tuple[str, ...], int, int]] = {
    "qkv": (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), WIDTH + 2 * KEYS, WIDTH),
    "out": (("self_attn.o_proj",), WIDTH, WIDTH),
    "up": (("mlp.gate_proj", "mlp.up_proj"), 2 * MLP, WIDTH),
    "down": (("mlp.down_proj",), WIDTH, MLP),
}


def merge(weights: dict[str, np.ndarray], adapters: Mapping[str, np.ndarray]) -> None:
    """Add `b @ a` to the matrices of every layer, in place.

    weights: float32, named as in `LlamaModel`. adapters: `adapters.<kind>.a` `[30, rank, inputs]` and
    `adapters.<kind>.b` `[30, outputs, rank]`, of any float dtype; the sum is formed in float32.
    """
    for kind, (parts, _, _) in KINDS.items():
        a, b = (adapters[f"adapters.{kind}.{side}"].astype(np.float32) for side in "ab")
        for layer in range(LAYERS):
            names = [f"layers.{layer}.{part}.weight" for part in parts]
            ends = np.cumsum([len(weights[name]) for name in names])
            for name, change in zip(names, np.split(b[layer] @ a[layer], ends[:-1]), strict=True):
                weights[name] += change
