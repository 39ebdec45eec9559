"""What callers do to a cache between steps: rows reordered, selected and repeated take their own layouts along."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import BATCHES, pipeline

import prunekit
from prunekit.testing.tiny import IMAGE, tiny_inputs, tiny_llava
from prunekit.upstream import CACHE
from prunekit.verify.oracle import MaskedReference
from prunekit.verify.precision import Float64Throughout

CHANGES = {
    "reordered": (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 1])), [2, 0, 1]),
    "selected": (lambda cache: cache.batch_select_indices(torch.tensor([1, 2])), [1, 2]),
    "repeated": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["fastv", "divprune-fastv-skip", "random-pool-divprune"])
@pytest.mark.parametrize("change", CHANGES)
def test_rows_keep_their_tokens(change, name, attention):
    """The rows of a ragged batch hold different tokens, so a layout left in its old row would show at once."""
    from twins import pool_merges

    alter, rows = CHANGES[change]
    model, inputs = tiny_llava(attention), tiny_inputs(*BATCHES["text-row"])
    tokens = torch.randint(IMAGE + 1, 100, (3, 3), generator=torch.Generator().manual_seed(0))
    with Float64Throughout():
        with prunekit.apply(model, pipeline(name)) as run:
            cache = model(**inputs)[CACHE]
            alter(cache)
            mask, logits = inputs["attention_mask"][rows], []
            for step in range(2):
                mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
                given = {"input_ids": tokens[rows, step : step + 1], "attention_mask": mask}
                logits.append(model(**given, **{CACHE: cache}).logits[:, -1])
        merges = pool_merges(pipeline(name)["stages"])(run.report)
        reference = MaskedReference(model, inputs, run.report, merges).logits(tokens)
    assert (torch.stack(logits, 1) - reference[rows, 1:]).abs().max() < 1e-9


def test_copies_of_a_cache_go_on_independently():
    """A prefilled cache is copied to answer several continuations of one prompt."""
    model, inputs = tiny_llava(), tiny_inputs(*BATCHES["ragged"])
    tokens = torch.randint(IMAGE + 1, 100, (2, 3, 1), generator=torch.Generator().manual_seed(0))
    mask = torch.cat([inputs["attention_mask"], inputs["attention_mask"].new_ones(3, 1)], 1)

    def after(token, cache):
        return model(input_ids=token, attention_mask=mask, **{CACHE: cache}).logits

    with Float64Throughout(), prunekit.apply(model, pipeline("divprune-fastv-skip")):
        first = model(**inputs)[CACHE]
        expected = [after(token, model(**inputs)[CACHE]) for token in tokens]
        copies = [copy.deepcopy(first) for _ in tokens]
        found = [after(token, one) for token, one in zip(tokens, copies, strict=True)]
    assert first.get_seq_length() + 1 == copies[0].get_seq_length()
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
