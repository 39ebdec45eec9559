"""What the tests of refusals share: a small model, a flash kernel that is none, and the proof that nothing ran."""

from __future__ import annotations

import re
from contextlib import contextmanager

import pytest
import torch
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask

import prunekit
from prunekit.testing.tiny import tiny_inputs, tiny_llava

FASTV = {"name": "fastv", "stages": [{"use": "fastv", "at": 2, "keep": 0.4}]}
FLASH = "flash_of_the_tests"


def model_of(attention="sdpa", **options):
    return tiny_llava(attention, dtype=torch.float32, **options)


def inputs_of(*arguments):
    return tiny_inputs(*arguments, dtype=torch.float32)


@contextmanager
def refused(phrase, model, after=0, error=prunekit.Unsupported):
    """Within the block `error` is raised with `phrase`, once at most `after` decoder layers have run."""
    ran = []
    layers = model.get_decoder().layers
    handles = [_mlp(layer).register_forward_hook(lambda *_: ran.append(1)) for layer in layers]
    try:
        with pytest.raises(error, match=re.escape(phrase)):
            yield
    finally:
        for handle in handles:
            handle.remove()
    assert len(ran) <= after, f"{len(ran)} layers ran before the refusal"


def _mlp(layer):
    return layer.mlp if hasattr(layer, "mlp") else layer.feed_forward


@contextmanager
def flash_kernel():
    """A kernel with the interface of flash attention: 2-D masks, causal by itself; the arithmetic is plain."""

    def kernel(module, query, key, value, mask, scaling=None, **kwargs):
        group = query.shape[1] // key.shape[1]
        logits = query @ key.repeat_interleave(group, 1).transpose(-1, -2) * (scaling or query.shape[-1] ** -0.5)
        seen = torch.ones(logits.shape[-2:], dtype=torch.bool).tril(logits.shape[-1] - logits.shape[-2])
        seen = seen if mask is None else seen & mask.bool()[:, None, None, :]
        weights = logits.masked_fill(~seen, torch.finfo(logits.dtype).min).softmax(-1)
        return (weights @ value.repeat_interleave(group, 1)).transpose(1, 2), None

    AttentionInterface.register(FLASH, kernel)
    ALL_MASK_ATTENTION_FUNCTIONS.register(FLASH, flash_attention_mask)
    try:
        yield
    finally:
        del AttentionInterface._global_mapping[FLASH]
        del ALL_MASK_ATTENTION_FUNCTIONS._global_mapping[FLASH]
