"""What a strategy's own selection costs at the shape of LLaVA-1.5-7B."""

from __future__ import annotations

from typing import Any

from asking import stage_of
from prunekit_evals.bench import llava_7b

from prunekit.pipeline.statements import selection_flops


def share_of_prefill(use: str, **options: Any) -> float:
    """Of the dense prefill of an image and 64 words of text."""
    return selection_flops(stage_of(use, **options), llava_7b.shape(), 64, 576) / llava_7b.dense_flops()
