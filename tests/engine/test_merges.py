"""Weights of every shape reach the right slots: merges that are neither averages nor symmetric, from both hooks."""

from __future__ import annotations

import pytest
import torch
from cases import BATCHES
from hypothesis import given, settings
from hypothesis import strategies as st

import prunekit
from prunekit import Owners, Selection, Sites, hookimpl, plugins, strategy
from prunekit.engine.tokens.merges import merged
from prunekit.families import find
from prunekit.testing.tiny import tiny_inputs, tiny_llava
from prunekit.testing.tiny_families import tiny_batch, tiny_model
from prunekit.verify.equivalence import assert_equivalent
from prunekit.verify.precision import Float64Throughout


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


def owners_of(keep, valid):
    """Every token joins the nearest kept one, of two the earlier; every fourth dropped token goes nowhere."""
    owner = torch.full(keep.shape, -1)
    for b, row in enumerate(keep.view(-1, keep.shape[-1])):
        anchors = row.nonzero()[:, 0].tolist()
        for token in range(keep.shape[-1]):
            if row[token] or (anchors and token % 4):
                nearest = min(anchors, key=lambda anchor: abs(anchor - token))
                owner.view(-1, keep.shape[-1])[b, token] = nearest
    return owner


def amounts_of(hidden):
    """Different for every token, some of them negative; independent of padding."""
    return hidden[..., 0] - hidden[..., 1]


@strategy(sites=Sites(tower=True), keep="refused")
class Sparse:
    """Baseline: groups by owner, or the matrix that they stand for, made the slow way."""

    mode: str = "mean"
    dense: bool = False
    hook: str = "select_tokens"

    def _weights(self, keep, hidden, valid, sizes):
        owner = owners_of(keep, valid)
        amounts = amounts_of(hidden) if self.mode == "sum" else None
        if not self.dense:
            return Owners(owner, self.mode, amounts)
        factors = {"mean": torch.ones_like(sizes), "size_mean": sizes, "sum": amounts}[self.mode].to(hidden)
        groups = (owner[..., None, :] == torch.arange(keep.shape[-1])[:, None]) & valid[..., None, :]
        matrix = groups * factors[..., None, :]
        return matrix if self.mode == "sum" else (matrix / matrix.sum(-1, keepdim=True)).nan_to_num(0)

    @hookimpl
    def select_tokens(self, hidden, valid, sizes):
        keep = odd(valid)
        new = (sizes + torch.arange(keep.shape[-1]) % 3).to(hidden.dtype)
        return Selection(keep, self._weights(keep, hidden, valid, sizes) if self.hook == "select_tokens" else None, new)

    @hookimpl
    def merge_tokens(self, keep, hidden, valid, sizes):
        return self._weights(keep, hidden, valid, sizes)


@strategy(sites=Sites(tower=True), keep="refused", per_sample=True)
class SparseOneByOne(Sparse):
    """Baseline: the same, a sample at a time; short samples merge nothing."""

    def _weights(self, keep, hidden, valid, sizes):
        return super()._weights(keep, hidden, valid, sizes) if len(hidden) > 5 else None


MERGERS |= {"sparse": Sparse, "sparse-one-by-one": SparseOneByOne}
SITES = {
    "decoder": ["encoder", "1", "3.mid"],
    "inside": ["vision.0.mid", "vision.1", "2.after"],
}


def pipeline_of(name, sites, **options):
    stages = [{"use": name, "at": int(site) if site.isdigit() else site, **options} for site in sites]
    return {"name": "sparse", "stages": stages}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("mode", ["mean", "size_mean", "sum"])
@pytest.mark.parametrize("name", ["sparse", "sparse-one-by-one"])
@pytest.mark.parametrize("where", SITES)
def test_a_sparse_merge_is_the_matrix_that_it_stands_for(where, name, mode, batch):
    model, inputs, logits = tiny_llava(), tiny_inputs(*BATCHES[batch]), []
    with Float64Throughout(), torch.no_grad():
        for options in ({"dense": True}, {}, {"hook": "merge_tokens"}):
            with prunekit.apply(model, pipeline_of(name, SITES[where], mode=mode, **options)):
                logits.append(model(**inputs).logits[:, -1])
    torch.testing.assert_close(logits[1], logits[0], atol=1e-11, rtol=1e-11)
    assert torch.equal(logits[2], logits[1])


@pytest.mark.parametrize("mode", ["mean", "size_mean", "sum"])
@pytest.mark.parametrize("name", ["sparse", "sparse-one-by-one"])
def test_sparse_merges_equal_the_reference(name, mode):
    pipeline = pipeline_of(name, SITES["decoder"], mode=mode)
    assert_equivalent(tiny_llava(), pipeline, tiny_inputs(*BATCHES["ragged"]))


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.lists(st.integers(-1, 6), min_size=7, max_size=7), min_size=1, max_size=3),
    st.sampled_from(["mean", "size_mean", "sum"]),
    st.integers(0, 1000),
)
def test_groups_are_summed_by_index(owners, mode, seed):
    draw = torch.Generator().manual_seed(seed)
    owner = torch.tensor(owners)
    tokens = torch.randn(*owner.shape, 2, 3, dtype=torch.float64, generator=draw)
    sizes = torch.rand(owner.shape, generator=draw, dtype=torch.float64) + 0.1
    amounts = torch.randn(owner.shape, generator=draw, dtype=torch.float64)
    result = merged(Owners(owner, mode, amounts if mode == "sum" else None), tokens, sizes)
    for b, row in enumerate(owners):
        for anchor in set(row) - {-1}:
            group = [token for token, of in enumerate(row) if of == anchor]
            factors = {"mean": torch.ones_like(sizes), "size_mean": sizes, "sum": amounts}[mode][b, group]
            factors = factors if mode == "sum" else factors / factors.sum()
            wanted = sum(factor * tokens[b, token] for factor, token in zip(factors, group, strict=True))
            torch.testing.assert_close(result[b, anchor], wanted, atol=1e-13, rtol=1e-12)


def test_owners_keep_gradients_and_half_precision_sums_in_float32():
    tokens = torch.full((1, 3000, 1), 0.1, dtype=torch.bfloat16)
    owner = torch.zeros(1, 3000, dtype=torch.int64)
    mean = merged(Owners(owner), tokens, torch.ones(1, 3000))[0, 0]
    assert mean == tokens[0, 0]
    amounts = torch.rand(1, 5, requires_grad=True)
    owners = Owners(torch.zeros(1, 5, dtype=torch.int64), "sum", amounts)
    merged(owners, torch.ones(1, 5, 2), torch.ones(1, 5)).sum().backward()
    assert torch.equal(amounts.grad, torch.full((1, 5), 2.0))


@pytest.mark.parametrize(
    ("mode", "amounts", "message"),
    [("median", None, "it takes 'mean', 'size_mean', 'sum'"), ("sum", None, "needs them"), ("mean", 1, "belong to")],
)
def test_owners_that_contradict_themselves(mode, amounts, message):
    with pytest.raises(ValueError, match=message):
        Owners(torch.zeros(1, 2, dtype=torch.int64), mode, amounts)


def test_a_merge_behind_a_layer_comes_before_what_the_decoder_adds_there():
    """DeepStack: a merged slot gets its anchor's own features, as every token does, after the merge."""
    model = tiny_model("qwen3_vl")
    assert find(model).logical_until > 1
    for site in ("0.after", "1.after"):
        pipeline = {"stages": [{"use": "pool", "at": site, "keep": 0.3}]}
        found = assert_equivalent(model, pipeline, tiny_batch(model), steps=2)
        assert found.report.kept_tokens < found.report.visual_tokens
