"""A flash attention kernel by its interface, in plain arithmetic: it is given a 2-D mask of padding or none at all.

What it sees is causal by itself, aligned at the end, and within a window by the distance of the entries it is given.
"""

from __future__ import annotations

from contextlib import contextmanager

import torch
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask

NAME = "flash_by_hand"


def kernel(module, query, key, value, mask, scaling=None, sliding_window=None, **kwargs):
    """As `transformers.integrations.flash_attention`, (B, A, Q, D) and (B, A, K, D) to (B, Q, A, D)."""
    group = query.shape[1] // key.shape[1]
    logits = query @ key.repeat_interleave(group, 1).transpose(-1, -2) * scaling
    queries, keys = logits.shape[-2:]
    distance = torch.arange(queries)[:, None] + keys - queries - torch.arange(keys)
    seen = distance >= 0
    if sliding_window is not None:
        seen = seen & (distance < sliding_window)
    seen = seen if mask is None else seen & mask.bool()[:, None, None, :]
    weights = logits.masked_fill(~seen, torch.finfo(logits.dtype).min).softmax(-1)
    return (weights @ value.repeat_interleave(group, 1)).transpose(1, 2), None


@contextmanager
def flash(model):
    """While open, the decoder of `model` runs on the kernel."""
    config = model.config.get_text_config()
    before = config._attn_implementation
    AttentionInterface.register(NAME, kernel)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, flash_attention_mask)
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
        del AttentionInterface._global_mapping[NAME]
        del ALL_MASK_ATTENTION_FUNCTIONS._global_mapping[NAME]
