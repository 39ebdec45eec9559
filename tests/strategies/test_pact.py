"""PACT: scores, centres and merges by loops, the mean query by hand, sizes in attention, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from asking import stage_of
from loops import SEEDS, best, cosine, decided, some
from selection_cost import share_of_prefill

from prunekit import PromptTokens, SpecError
from prunekit.engine.attention import decoder_rows
from prunekit.engine.attention.attended import Attended
from prunekit.testing.tiny import tiny_inputs, tiny_llava
from prunekit.testing.tiny_families import tiny_batch, tiny_model
from prunekit.verify.equivalence import assert_equivalent


def pact(**options):
    return stage_of("pact", **options)


def twin(attention, keys, hidden, important, cutoff, reach):
    """Owners, by loops."""
    number = len(attention)
    scores = [a * math.sqrt(sum(x * x for x in state)) for a, state in zip(attention, hidden, strict=True)]
    chosen = sorted(best(scores, max(int(number * important), 1)))
    apart = [[0.0 if i == j else max(1 - cosine(keys[i], keys[j]), 0.0) for j in range(number)] for i in range(number)]
    density = [-1.0] * number
    for i in chosen:
        density[i] = sum(math.exp(-((one / 2) ** 2)) for one in sorted(apart[i][j] for j in chosen))
    centres = []
    for i in sorted(chosen, key=lambda i: (-round(density[i], 9), i)):
        if all(apart[i][j] > cutoff for j in centres):
            centres.append(i)
    owner = []
    for i in range(number):
        nearest = min(sorted(centres), key=lambda j, i=i: (round(apart[i][j], 12), j))
        owner.append(i if i in centres else nearest if apart[i][nearest] <= reach * cutoff else -1)
    return owner


@pytest.mark.parametrize("seed", SEEDS)
def test_it_does_what_a_loop_does(seed):
    """Every second seed has keys whose cosines are exact and often equal, and few different scores."""
    visual = (1, 2, 3, 16, 17, 33)[seed % 6]
    ties = seed % 2 == 0
    attention, hidden = some(seed, visual, ties=ties).abs(), some(seed + 50, visual, 4, ties=ties)
    keys = some(seed + 100, visual, 4).sign() if ties else some(seed + 100, visual, 5)
    important, cutoff, reach = (0.55, 1.0, 0.3)[seed % 3], (0.21, 0.6, 0.0)[seed // 2 % 3], (1.5, 1.0, 3.0)[seed % 3]
    stage = pact(important=important, cutoff=cutoff, reach=reach)
    found = decided(stage, None, attention=attention, keys=keys, hidden=hidden, sizes=torch.ones(visual))
    wanted = twin(attention.tolist(), keys.tolist(), hidden.tolist(), important, cutoff, reach)
    assert found.weights.owner.tolist() == wanted and found.weights.mode == "size_mean"
    assert found.keep.tolist() == [i == other for i, other in enumerate(wanted)]
    assert found.sizes[found.keep].tolist() == [wanted.count(i) for i, other in enumerate(wanted) if i == other]


def test_numbers_of_the_authors_settings():
    """floor(0.55 * 576) tokens may be centres: with no two near each other all of them are, each for itself."""
    keys = torch.eye(576, dtype=torch.float64)
    ones = torch.ones(576, dtype=torch.float64)
    found = decided(pact(), None, attention=ones, keys=keys, hidden=keys, sizes=ones)
    assert found.keep.nonzero()[:, 0].tolist() == list(range(316))
    assert (found.weights.owner >= 0).sum() == 316
    same = decided(pact(), None, attention=ones, keys=keys[:1].expand(576, -1), hidden=keys, sizes=ones)
    assert same.keep.nonzero()[:, 0].tolist() == [0] and same.sizes[0] == 576


def test_sizes_of_earlier_merges_count():
    keys, ones = torch.ones(3, 2).double(), torch.ones(3).double()
    found = decided(pact(), None, attention=ones, keys=keys, hidden=keys, sizes=torch.tensor([2.0, 5.0, 1.0]))
    assert found.weights.owner.tolist() == [0, 0, 0] and found.sizes[0] == 8
    assert decided(pact(proportional=False), None, attention=ones, keys=keys, hidden=keys, sizes=ones).sizes is None


def test_scores_beyond_half_precision_are_ranked():
    """A norm above 65504 is infinite in fp16, and attention below 6e-8 is zero."""
    hidden = torch.full((3, 64), 20000.0, dtype=torch.float16)
    hidden[1] = 30000
    keys = torch.eye(3, 64, dtype=torch.float16)
    attention = torch.tensor([1e-9, 1e-9, 2e-9])
    found = decided(pact(important=0.4), None, attention=attention, keys=keys, hidden=hidden, sizes=torch.ones(3))
    assert found.keep.tolist() == [False, False, True]
    found = decided(pact(important=0.7), None, attention=attention, keys=keys, hidden=hidden, sizes=torch.ones(3))
    assert found.keep.tolist() == [False, True, True]


def test_the_mean_query_by_hand():
    """Over all tokens up to the image, before rotation, in each head by itself; two heads share a key."""
    heads, length, dim, start, visual = 4, 9, 6, 2, 5
    q, k = some(1, 1, heads, length, dim), some(2, 1, 2, length, dim)
    places = torch.arange(length)
    image = (places >= start) & (places < start + visual)
    known = (torch.ones_like(image), image, ~image, places > 6)
    prompt = PromptTokens(places[None], some(3, 1, length, 4), *(one[None] for one in known))
    spec = pact().inputs["attention"]
    asked = spec.queries(prompt)
    assert asked[0].tolist() == [i < start + visual for i in range(length)] and not spec.rope and spec.layer == "next"
    slots = asked.nonzero()[:, 1][None]
    states = Attended(q, k, k, None, dim**-0.5)
    found = decoder_rows.attention(states, slots, slots >= 0, image[None], places[image][None], spec)[0]
    wanted = torch.zeros(visual, dtype=torch.float64)
    for head in range(heads):
        mean = sum(q[0, head, i] for i in range(7)) / 7
        logits = [float(mean @ k[0, head // 2, i]) / math.sqrt(dim) for i in range(7)]
        total = sum(map(math.exp, logits))
        wanted += torch.tensor([math.exp(one) / total / heads for one in logits[start:]], dtype=torch.float64)
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("options", [{}, {"at": "2.after", "proportional": False}])
def test_it_is_exact_behind_another(options):
    """`cutoff` is for keys of random weights, which are far from each other."""
    stages = [{"use": "random", "keep": 0.75}, {"use": "pact", "at": 2, "cutoff": 0.5, **options}]
    stages.append({"use": "fastv", "at": 4, "keep": 0.1})
    found = assert_equivalent(tiny_llava(), {"stages": stages}, tiny_inputs(images=(1, 2)), steps=3)
    assert all(1 < len(one) < entered for one, entered in zip(found.report.events[1].kept, (12, 24), strict=True))
    assert (found.report.events[1].sizes is not None) == (options == {})


def test_it_is_exact_with_several_axes_of_positions():
    model = tiny_model("qwen2_5_vl")
    pipeline = {"stages": [{"use": "pact", "at": 1, "cutoff": 0.5}]}
    assert_equivalent(model, pipeline, tiny_batch(model), steps=2)


def test_what_is_refused():
    wrong = {"important": (0, "a fraction"), "cutoff": (2.5, "a cosine distance"), "reach": (0.5, "at least 1")}
    for name, (value, said) in wrong.items():
        with pytest.raises(SpecError, match=f"{name}.*{said}"):
            pact(**{name: value})
    with pytest.raises(SpecError, match="'pact' decides by itself and takes no `keep`"):
        pact(keep=0.5)
    with pytest.raises(SpecError, match=r"needs another point of the layer"):
        assert_equivalent(tiny_llava(), {"stages": [{"use": "pact", "at": "2.mid"}]}, tiny_inputs(), steps=1)


def test_the_selection_is_cheap():
    assert 0 < share_of_prefill("pact") < 0.02
