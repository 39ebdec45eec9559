"""What a strategy's own selection costs at the shape of LLaVA-1.5-7B."""

from __future__ import annotations

from typing import Any

from asking import stage_of

from prunekit import ModelShape, cost
from prunekit.pipeline.statements import selection_flops
from prunekit.strategy.decisions import TowerShape

TOWER = TowerShape(24, 22, leading=1, projects_tokens=True, width=1024)
LLAVA_7B = ModelShape(
    "llava", 32, 4096, 32, 128, 4 * 4096**2, 3 * 4096 * 11008, 2 * 4096, 576, output_params=4096**2, tower=TOWER
)


def share_of_prefill(use: str, **options: Any) -> float:
    """Of the dense prefill of an image and 64 words of text."""
    return selection_flops(stage_of(use, **options), LLAVA_7B, 64, 576) / cost.prefill_flops(LLAVA_7B, [640] * 32)
