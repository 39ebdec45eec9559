"""Weights of every shape reach the right slots: merges that are neither averages nor symmetric, from both hooks."""

from __future__ import annotations

import pytest
import torch
from cases import BATCHES

from prunekit import Selection, hookimpl, plugins, strategy
from prunekit.testing.tiny import tiny_inputs, tiny_llava
from prunekit.verify.equivalence import assert_equivalent


def skewed(hidden):
    """Weights that are different in every row and column and do not sum to one."""
    size = hidden.shape[-2]
    places = torch.arange(size, dtype=hidden.dtype)
    return ((places[:, None] * 3 + places * 7) % 5 / size).expand(*hidden.shape[:-2], size, size)


def odd(valid):
    """Every third token from the second on."""
    return valid & (torch.arange(valid.shape[-1]) % 3 == 1)


@strategy(keep="refused")
class InSelection:
    """Baseline: a batch at once, weights in the `Selection`."""

    @hookimpl
    def select_tokens(self, hidden, valid):
        return Selection(odd(valid), skewed(hidden))


@strategy(keep="refused")
class InMergeHook:
    """Baseline: a batch at once, weights from `merge_tokens`, which is told what was kept."""

    @hookimpl
    def select_tokens(self, valid):
        return odd(valid)

    @hookimpl
    def merge_tokens(self, keep, hidden):
        return skewed(hidden) + keep[..., None] + 2 * keep[..., None, :]


@strategy(keep="refused", per_sample=True)
class OneByOne:
    """Baseline: a sample at a time."""

    @hookimpl
    def select_tokens(self, valid):
        return odd(valid)

    @hookimpl
    def merge_tokens(self, keep, hidden):
        return skewed(hidden) if len(hidden) > 10 else None


MERGERS = {"in-selection": InSelection, "in-merge-hook": InMergeHook, "one-by-one": OneByOne}


class Plugin:
    """Registers the strategies above."""

    @hookimpl
    def prunekit_register(self, registry):
        for name, cls in MERGERS.items():
            registry.strategy(name, f"{cls.__module__}:{cls.__name__}")


@pytest.fixture(autouse=True)
def _registered():
    plugins.register(Plugin(), name="mergers")
    yield
    plugins.unregister("mergers")


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", MERGERS)
def test_merged_states_stand_in_their_slots(name, batch):
    stages = [{"use": name}, {"use": "random", "at": 1, "keep_tokens": 4}, {"use": name, "at": 3}]
    result = assert_equivalent(tiny_llava(), {"name": name, "stages": stages}, tiny_inputs(*BATCHES[batch]))
    first = result.report.events[0]
    assert first.kept == tuple(tuple(range(1, many, 3)) for many in first.entered)
    with pytest.raises(AssertionError, match="differ from the masked reference"):
        assert_equivalent(
            tiny_llava(), {"name": name, "stages": stages}, tiny_inputs(*BATCHES[batch]), 1, merges=lambda report: {}
        )
