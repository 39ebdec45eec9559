"""SparseVLM v1.5 and "+": the authors' raters, choices and clusters, twins by loops, lists and counts."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from asking import cases, stage_of
from golden_files import drawn
from loops import SEEDS, best, decided, kept, sizes, some

import prunekit
from prunekit import PromptTokens, SpecError
from prunekit.engine.attention import decoder_rows
from prunekit.engine.attention.attended import Attended
from prunekit.engine.decoder import aside
from prunekit.families import shape_of
from prunekit.testing.tiny import tiny_inputs, tiny_llava
from prunekit.verify.equivalence import assert_equivalent

both_precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def prompt_of(embeds, start, visual, real=None):
    """One sample's prompt with its image at `start`; real: bool (S,), not padding."""
    places = torch.arange(len(embeds))
    real = torch.ones_like(places, dtype=torch.bool) if real is None else real
    image = (places >= start) & (places < start + visual)
    text = real & ~image
    ones = (embeds, real, image, text, text & (places >= start + visual))
    return PromptTokens(places[None], *(one[None] for one in ones))


def raters_of(stage, prompt):
    """Where in the prompt they stand."""
    rows = stage.inputs["attention"]
    assert rows.layer == "own" and rows.over == "mean"
    return rows.queries(prompt)[0].nonzero()[:, 0]


@both_precisions
@pytest.mark.parametrize("case", cases("sparsevlm_v1.5", 4))
def test_the_authors_choice_and_clusters(case, dtype):
    p, t, expected = case["params"], drawn(case, dtype), case["expected"]
    start, visual = p["image_start"], p["visual_tokens"]
    stage, image = stage_of("sparsevlm", keep=0.5), slice(start, start + visual)
    raters = raters_of(stage, prompt_of(t["embeds"], start, visual))
    assert (raters - start - visual).tolist() == expected["raters"]
    states = t["layer_output"][image]
    score = t["attention"].mean(0)[raters].mean(0)[image]
    found = decided(stage, expected["count_kept"] + expected["clusters"], attention=score, hidden=states)
    owner, keep = found.weights.owner, found.keep.nonzero()[:, 0]
    whole = [i for i in keep.tolist() if i in expected["kept_sorted"]]
    assert whole == expected["kept_sorted"]
    centres = [i for i in keep.tolist() if i not in whole]
    clustered = [i for i, other in enumerate(owner.tolist()) if other in centres]
    assert sorted(clustered) == sorted(expected["recycled_in_score_order"])
    means = torch.stack([states[owner == centre].mean(0) for centre in centres])
    authors = torch.tensor(expected["merged"], dtype=dtype)
    assert len(means) == len(authors)
    torch.testing.assert_close(means[torch.cdist(authors, means).argmin(1)], authors, rtol=2e-5, atol=2e-5)


class Given(Attended):
    """Attention whose probabilities are given in `value`, (1, A, S, S)."""

    def scores(self, slots, inside, domain, temperature):
        """Rows (1, A, Q, S)."""
        return self.value[:, :, slots[0]] / self._decay(slots)


@both_precisions
@pytest.mark.parametrize("case", cases("sparsevlm_plus", 3))
def test_the_authors_choice_without_distance(case, dtype):
    """Their maps through the engine's own rows: decay undone, best heads, mean of raters."""
    p, t, expected = case["params"], drawn(case, dtype), case["expected"]
    start, visual, dim = p["image_start"], p["visual_tokens"], p["head_dim"]
    stage = stage_of("sparsevlm_plus", keep=0.5)
    raters = raters_of(stage, prompt_of(t["embeds"], start, visual))
    assert (raters - start - visual).tolist() == expected["raters"]
    length, step = len(t["embeds"]), p["image_position_step"]
    behind = start + step * visual
    positions = torch.tensor([
        *range(start), *(start + step * i for i in range(visual)), *(behind + j for j in range(length - start - visual))
    ])  # fmt: skip
    frequency = p["rope_base"] ** (-torch.arange(0, dim, 2).double() / dim)
    angle = (positions[:, None] * frequency).repeat(1, 2)[None]
    here = SimpleNamespace(arguments=lambda hidden: {"position_embeddings": (angle.cos(), angle.sin())})
    nothing = torch.zeros(1, p["heads"], length, dim, dtype=dtype)
    states = Given(nothing, nothing, t["attention"][None], None, 1.0, phases=aside.phases(here, nothing, dim))
    image = torch.arange(start, start + visual)
    seen = torch.zeros(1, length, dtype=torch.bool).index_fill(1, image, True)
    there = torch.ones(1, len(raters), dtype=torch.bool)
    least = (states.phases[0, raters] @ states.phases[0, image].T).min() * dim**0.5
    assert float(least) == pytest.approx(expected["rope_map_min_image_part"], abs=1e-3)
    spec = stage.inputs["attention"]
    assert spec.heads_of(32) == len(expected["heads_used"]) and spec.undecay
    spec = dataclasses.replace(spec, heads=14)
    score = decoder_rows.attention(states, raters[None], there, seen, image[None], spec)[0]
    assert kept(stage, expected["count"], attention=score) == expected["kept_sorted"]


def test_raters_by_a_loop():
    """One image and several, padding, prompts that end with the image or with a single word."""
    for seed in SEEDS:
        visual, behind, front, padding = 1 + seed % 5, seed % 6, seed % 3, 2 * (seed % 2)
        embeds = some(seed, padding + front + visual + behind, 4)
        real = torch.arange(len(embeds)) >= padding
        prompt = prompt_of(embeds, padding + front, visual, real)
        if seed % 5 == 4 and front:  # a second image in front of everything
            prompt.visual[0, padding], prompt.text[0, padding] = True, False
        points, image = embeds.tolist(), prompt.visual[0].nonzero()[:, 0].tolist()
        words = prompt.after[0].nonzero()[:, 0].tolist()
        shares = dict.fromkeys(words, 0.0)
        for v in image:
            powers = {w: math.exp(sum(a * b for a, b in zip(points[v], points[w], strict=True))) for w in words}
            for w in words:
                shares[w] += powers[w] / sum(powers.values()) / len(image)
        mean = sum(shares.values()) / max(len(words), 1)
        wanted = [w for w in words if shares[w] > mean + 1e-15] or words or [len(embeds) - 1]
        if len(words) == 1:
            wanted = words
        assert raters_of(stage_of("sparsevlm", keep=0.5), prompt).tolist() == wanted, seed


def clusters_of(states, number):
    """Centres by density and separation; the owner of each state, by its place in the list."""
    dim, many = len(states[0]), len(states)

    def apart(i, j):
        return math.sqrt(sum((a - b) ** 2 for a, b in zip(states[i], states[j], strict=True))) / math.sqrt(dim)

    density = []
    for i in range(many):
        near = sorted(apart(i, j) for j in range(many))[:number]
        density.append(-sum(d * d for d in near) / len(near))
    order = best(density, many)
    largest = max(apart(i, j) for i in range(many) for j in range(many))
    peaks = []
    for i in range(many):
        denser = order[: order.index(i)]
        separation = min((apart(i, j) for j in denser), default=largest)
        peaks.append(density[i] + math.log(separation) if separation else -math.inf)
    centres = best(peaks, number)
    return [i if i in centres else min(sorted(centres), key=lambda j: (apart(i, j), j)) for i in range(many)]


def twin(attention, states, count):
    """Owners, by the authors' counts: the largest list entry K for which K tokens and their clusters are `count`."""
    number = len(states)

    def recycled(entry):
        dropped = number - entry
        many = int(dropped * 0.3) + 1 if dropped else 0
        return many, int(many / 10) + 1 if many else 0

    entry = max((k for k in range(1, number + 1) if k + recycled(k)[1] <= count), default=1)
    many, clusters = recycled(entry)
    clusters = min(clusters, count - entry)
    order = best(attention, number)
    owner = [-1] * number
    for i in order[:entry]:
        owner[i] = i
    if clusters:
        again = order[entry : entry + many]
        for i, at in zip(again, clusters_of([states[i] for i in again], clusters), strict=True):
            owner[i] = again[at]
    return owner


@pytest.mark.parametrize("seed", SEEDS)
def test_it_does_what_a_loop_does(seed):
    visual, count = sizes(seed) if seed % 2 else (40 + seed % 13, 7 + seed % 17)
    attention, states = some(seed, visual, ties=seed % 3 == 0), some(seed + 100, visual, 5)
    found = decided(stage_of("sparsevlm", keep=0.5), count, attention=attention, hidden=states)
    assert found.weights.owner.tolist() == twin(attention.tolist(), states.tolist(), count)
    assert int(found.keep.sum()) == count


@pytest.mark.parametrize("seed", SEEDS)
def test_plus_keeps_what_a_loop_keeps(seed):
    visual, count = sizes(seed)
    attention = some(seed, visual, ties=seed % 2 == 0)
    stage = stage_of("sparsevlm_plus", keep=0.5)
    assert kept(stage, count, attention=attention) == sorted(best(attention.tolist(), count))


LISTS = {
    ("sparsevlm", 192): ([309, 204, 113], 206.5), ("sparsevlm", 128): ([312, 117, 39], 145.4),
    ("sparsevlm", 64): ([82, 32, 18], 82.3), ("sparsevlm_plus", 192): ([300, 200, 118], 206.8),
    ("sparsevlm_plus", 128): ([238, 108, 60], 144.1), ("sparsevlm_plus", 64): ([66, 34, 20], 81.8),
    ("sparsevlm_plus", 96): ([246, 54, 28], None), ("sparsevlm", 96): ([249, 55, 27], None),
}  # fmt: skip


@pytest.mark.parametrize(("use", "tokens"), LISTS)
def test_the_authors_lists(use, tokens):
    """Of 576 tokens and 32 layers; and every one is split into the authors' entry and its clusters again."""
    shape = dataclasses.replace(shape_of(tiny_llava()), layers=32, heads=32, visual_tokens=576)
    cuts = prunekit.load({"stages": [{"use": use, "tokens": tokens}]}).bind(shape).cuts
    left, mean = LISTS[use, tokens]
    assert [str(cut.site) for cut in cuts] == ["2.after", "6.after", "15.after"]
    assert [cut.keep.count(576, 576) for cut in cuts] == left
    if mean is not None:
        found = (3 * 576 + 4 * left[0] + 9 * left[1] + 16 * left[2]) / 32
        assert found == pytest.approx(mean, abs=0.06)
    if use == "sparsevlm":
        entries = {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)}[tokens]
        for entering, count, entry in zip([576, *left], left, entries, strict=False):
            scores = some(0, entering)
            owner = decided(stage_of(use), count, attention=scores, hidden=some(1, entering, 2)).weights.owner.tolist()
            joined = [i for i, other in enumerate(owner) if other != -1 and i not in best(scores.tolist(), entry)]
            assert len(joined) == int(0.3 * (entering - entry)) + 1
            assert len({owner[i] for i in joined}) == count - entry and not {owner[i] for i in joined} - set(joined)


@pytest.mark.parametrize("use", ["sparsevlm", "sparsevlm_plus"])
def test_the_schedule_scales_with_depth(use):
    for layers, sites in ((28, ["2.after", "5.after", "13.after"]), (6, ["0.after", "1.after", "3.after"])):
        shape = dataclasses.replace(shape_of(tiny_llava()), layers=layers, heads=32)
        cuts = prunekit.load({"stages": [{"use": use}]}).bind(shape).cuts
        assert [str(cut.site) for cut in cuts] == sites
    with pytest.raises(SpecError, match=r"another point of the layer: '2.after'"):
        stage_of(use, at=2)
    with pytest.raises(SpecError, match="tokens"):
        stage_of(use, tokens=100)


def test_heads_that_there_are_not():
    with pytest.raises(SpecError, match=r"heads.*the model has 4 attention heads in a layer, not 14"):
        prunekit.load({"stages": [{"use": "sparsevlm_plus", "heads": 14}]}).bind(shape_of(tiny_llava()))
    for heads in (0, 1.0, -0.5):
        with pytest.raises(SpecError, match=r"heads.*is at least 1, or a fraction below 1"):
            stage_of("sparsevlm_plus", heads=heads)


@pytest.mark.parametrize("positions", ["keep", "renumber"])
@pytest.mark.parametrize("options", [{"use": "sparsevlm"}, {"use": "sparsevlm_plus"}], ids=str)
def test_they_are_exact_behind_another(options, positions):
    pipeline = {"positions": positions, "stages": [{"use": "random", "keep": 0.75}, {**options, "tokens": 64}]}
    inputs = tiny_inputs(images=(1, 2), text=(5, 9))
    found = assert_equivalent(tiny_llava(), pipeline, inputs, steps=3)
    assert [event.site for event in found.report.events] == ["encoder", "0.after", "1.after", "3.after"]
