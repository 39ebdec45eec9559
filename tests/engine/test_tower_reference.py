"""The masked reference inside vision towers: `assert_equivalent` covers merges and sizes there."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from prunekit import Selection, Sites, hookimpl, load, strategy
from prunekit.registry import Registry
from prunekit.testing.tiny_families import tiny_batch, tiny_model
from prunekit.verify.equivalence import assert_equivalent

# Leading CLS; rows of patches; tiles joined with newlines; groups of patches; one sequence, with windows and without.
MASKED = ("llava", "paligemma", "llava_next", "idefics3", "aya_vision")
PACKED = ("qwen2_vl", "qwen2_5_vl", "mistral3")
model_of = cache(tiny_model)


@strategy(sites=Sites(tower=True), keep="refused")
class Skewed:
    """Merges that are neither averages nor symmetric, and keeps a number that depends on the image.

    Never all but padding of a tile, which would then see nothing: no mask says what that is.
    """

    @hookimpl
    def select_tokens(self, hidden, valid):
        number = torch.arange(hidden.shape[1])
        weights = ((number[:, None] * 3 + number * 7) % 5 / len(number)).to(hidden.dtype).expand(len(hidden), -1, -1)
        return Selection(((number % 3 == 0) | (number % 3 == 1) & (hidden[..., 0] > -1)) & valid, weights)


@strategy(sites=Sites(tower=True), keep="refused", per_sample=True)
class Halves:
    """Each second token joins the first of its pair, weighted by their sizes, which add up (ToMe's rule)."""

    @hookimpl
    def select_tokens(self, hidden, sizes):
        number = torch.arange(len(hidden))
        weights = torch.diag(sizes.to(hidden.dtype))
        weights[number // 2 * 2, number] = sizes.to(hidden.dtype)
        return Selection(number % 2 == 0, weights / weights.sum(1, keepdim=True), weights.sum(1))


def piped(*stages):
    registry = Registry()
    registry.strategy("skewed", f"{__name__}:Skewed")
    registry.strategy("halves", f"{__name__}:Halves")
    return load({"name": "tower", "stages": list(stages)}, registry=registry)


@pytest.mark.parametrize("at", ["vision.0", "vision.1.mid", ["vision.0.mid", "vision.0", "vision.1"]], ids=str)
@pytest.mark.parametrize("family", MASKED + PACKED)
def test_merges_of_any_shape(family, at):
    model = model_of(family)
    found = assert_equivalent(model, piped({"use": "skewed", "at": at}), tiny_batch(model), steps=2)
    assert set(found.merges) == set(range(len(found.report.events)))
    assert all(few < many for few, many in zip(found.report.kept_tokens, found.report.visual_tokens, strict=True))


@pytest.mark.parametrize("family", MASKED)
def test_sizes_of_several_merges(family):
    """The sizes of the last event hold, not their product; a stage of the decoder merges what was kept."""
    model = model_of(family)
    pipeline = piped({"use": "halves", "at": ["vision.0.mid", "vision.1.mid"]}, {"use": "skewed", "at": 2})
    found = assert_equivalent(model, pipeline, tiny_batch(model), steps=2)
    assert found.report.events[1].sizes is not None


def test_a_reference_without_the_merge_is_noticed():
    model = model_of("llava")
    with pytest.raises(AssertionError, match="differ from the masked reference"):
        pipeline = piped({"use": "skewed", "at": "vision.0"})
        assert_equivalent(model, pipeline, tiny_batch(model), steps=2, merges=lambda report: {})
