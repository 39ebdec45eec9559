"""AutoPrune: both kinds of cuts by loops, information by hand, the curve and its total, exactness, and refusals."""

from __future__ import annotations

import dataclasses
import math

import naive
import pytest
import torch
from asking import stage_of
from loops import SEEDS, best, decided, some
from selection_cost import share_of_prefill

import prunekit
from prunekit import EncoderRows, PromptTokens, SpecError
from prunekit.families import shape_of
from prunekit.testing.tiny import tiny_inputs, tiny_llava
from prunekit.testing.tiny_families import tiny_batch, tiny_model
from prunekit.verify.equivalence import assert_equivalent


def information(rows):
    """Bits that words and tokens tell of each other, over heads; rows[i][head][word], by loops."""
    words, heads, total = len(rows[0][0]), len(rows[0]), 0.0
    for head in range(heads):
        for one in rows:
            marginal = sum(one[head]) / words
            for value in one[head]:
                joint = value / words
                total += joint * math.log2(max(joint / (marginal / words + 1e-6), 1e-6))
    return total


def after_clusters(tokens, kept):
    """What is left of `tokens` when `kept` stay and of the others some are clustered: count, recycled, clusters."""
    dropped = tokens - kept
    if not dropped:
        return kept, 0, 0
    recycled = int(0.3 * dropped) + 1
    clusters = min(recycled // 10 + 1, recycled)
    return kept + clusters, recycled, clusters


def curve(tokens, mean, bits, layers, k0, gamma, x0):
    """How many stay behind layers 1, 2, ..., by loops; the scale is found by trying halves, as the authors do."""
    k = max(k0 - gamma * bits, 0)
    shares = [0.75 / (1 + math.exp(k * (32 * layer / layers - (x0 + k)))) for layer in range(1, layers)]

    def total(scale):
        left, all_of = tokens, tokens
        for share in shares:
            left, _, _ = after_clusters(left, math.ceil((tokens - 1) * min(scale * share, 1.0)))
            all_of += left
        return all_of

    low, high, tried = 0.0, 20.0, []
    for _ in range(200):
        middle = (low + high) / 2
        tried.append(middle)
        low, high = (middle, high) if total(middle) < layers * mean else (low, middle)
    scale = min(tried, key=lambda one: abs(total(one) - layers * mean))
    return [math.ceil((tokens - 1) * (scale * share)) for share in shares], total(scale)


@pytest.mark.parametrize("seed", SEEDS)
def test_it_does_what_a_loop_does(seed):
    """At three sites, one after the other; every third seed has equal tokens."""
    visual, heads, words = (1, 2, 3, 16, 17, 33, 60)[seed % 7], 2, 1 + seed % 4
    options = {"layer_mean": (0.111, 0.3, 0.5, 1.0)[seed % 4], "gamma": (0.2, 0.0)[seed % 2]}
    stage, state, sites, left = stage_of("autoprune", **options), {}, (None,) * 5, list(range(visual))
    mean = max(math.floor(options["layer_mean"] * visual + 0.5 + 1e-9), 1)
    kept_behind = None
    for cut in range(3):
        ties = seed % 3 == 0
        drawn = (some(seed + cut, len(left), heads, words, ties=ties).abs() + 0.5) / (4 * visual)
        of_tower, hidden = some(seed + cut + 40, len(left), ties=ties).abs(), some(seed + cut + 80, len(left), 4)
        found = decided(
            stage, None, attention=drawn, encoder_attention=of_tower, hidden=hidden, cut=cut, sites=sites, state=state
        )
        rows = drawn.tolist()
        # Means as in tensors: sums of equal numbers in another order need not be equal.
        score, bits = drawn.mean((1, 2)).tolist(), information(rows)
        if cut == 0:
            first = (of_tower + 0.3 * bits / words * drawn.mean((1, 2))).tolist()
            owner = [i if i in best(first, int(2.5 * mean)) else -1 for i in range(visual)]
            assert found.weights is None
        else:
            if cut == 1:
                kept_behind, _ = curve(len(left), mean, bits, 6, 0.4, options["gamma"], 14.9)
            kept = min(kept_behind[cut - 1], len(left))
            _, recycled, clusters = after_clusters(len(left), kept)
            owner = naive.recycle(score, hidden.tolist(), kept, recycled, clusters)
            assert found.weights.owner.tolist() == owner and found.weights.mode == "mean"
        assert found.keep.tolist() == [i == other for i, other in enumerate(owner)]
        left = [left[i] for i, stays in enumerate(found.keep.tolist()) if stays]


@pytest.mark.parametrize("bits", [0.0, 0.5, 1.0, 3.0])
def test_the_mean_over_layers_is_met(bits):
    """64 of 576 tokens, 160 of which come to layer 1, in 32 layers: 2048 in all, but for rounding up."""
    kept = stage_of("autoprune").strategy._kept(160, 64, bits, 32)
    wanted, total = curve(160, 64, bits, 32, 0.4, 0.2, 14.9)
    assert kept == wanted and len(kept) == 31 and kept == sorted(kept, reverse=True)
    assert abs(total - 2048) <= 31
    assert (len(set(kept)) == 1) == (bits >= 2), "where k is 0 the curve is flat"


def test_information():
    """Words that look at one token each tell two bits of four; words that look alike tell nothing."""
    from prunekit_strategies.autoprune import _information

    apart = torch.eye(4, dtype=torch.float64)[:, None]
    assert _information(apart) == pytest.approx(2.0, abs=1e-4)
    assert _information(torch.full((4, 2, 4), 0.25, dtype=torch.float64)) == pytest.approx(0.0, abs=1e-4)
    some_rows = some(0, 5, 2, 3).abs() / 9
    assert _information(some_rows) == pytest.approx(information(some_rows.tolist()))


def test_who_reads():
    """All text behind the image; where there is none, the last token."""
    spec = stage_of("autoprune").inputs["attention"]
    places = torch.arange(6).expand(2, -1)
    real = torch.tensor([[True] * 6, [True] * 5 + [False]])
    image = (places > 1) & (places < torch.tensor([[4], [5]]))
    after = (places > 3) & (places < 6) & torch.tensor([[True], [False]])
    asked = spec.queries(PromptTokens(places, torch.zeros(2, 6, 4), real, image, real & ~image, after))
    assert asked.tolist() == [[False] * 4 + [True] * 2, [False] * 4 + [True, False]]
    assert spec.layer == "own" and spec.heads == spec.over == "none"


def test_it_acts_behind_every_layer_but_the_last():
    cuts = prunekit.load({"stages": [{"use": "autoprune"}]}).bind(shape_of(tiny_llava())).cuts
    assert [str(cut.site) for cut in cuts] == [f"{layer}.after" for layer in range(5)]
    assert stage_of("autoprune").inputs["encoder_attention"] == EncoderRows()


@pytest.mark.parametrize("positions", ["keep", "renumber"])
def test_it_is_exact_behind_another(positions):
    stages = [{"use": "random", "keep": 0.75}, {"use": "autoprune", "layer_mean": 0.3}]
    inputs = tiny_inputs(images=(1, 2), text=(9, 14))
    found = assert_equivalent(tiny_llava(), {"positions": positions, "stages": stages}, inputs, steps=3)
    left = [list(map(len, event.kept)) for event in found.report.events]
    # Of 12 and 24 tokens 4 and 7 on average.
    assert left[0] == [12, 24] and left[1] == [10, 17] and left[-1][0] < 10 and left[-1][1] < 17


@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl"])
def test_it_is_exact_elsewhere(name):
    """Crops with newlines; a tower without CLS."""
    model = tiny_model(name)
    stage = {"use": "autoprune", "layer_mean": 0.4, "query": "cls" if name == "llava_next" else "mean"}
    assert_equivalent(model, {"stages": [stage]}, tiny_batch(model), steps=2)


def test_what_is_refused():
    with pytest.raises(SpecError, match="this vision tower has no CLS token"):
        prunekit.load({"stages": [{"use": "autoprune"}]}).bind(shape_of(tiny_model("qwen2_5_vl")))
    with pytest.raises(SpecError, match="'autoprune' decides by itself and takes no `keep`"):
        stage_of("autoprune", keep=0.5)
    with pytest.raises(SpecError, match="layer_mean: is a fraction"):
        stage_of("autoprune", layer_mean=0)
    with pytest.raises(SpecError, match="needs another point of the layer"):
        prunekit.load({"stages": [{"use": "autoprune", "at": 2}]}).bind(dataclasses.replace(shape_of(tiny_llava())))


def test_the_selection_is_cheap():
    """A decision at full length; there is one behind every layer."""
    assert 0 < 32 * share_of_prefill("autoprune") < 0.02
