"""FastVID: a naive twin, figures, and videos of several families."""

from __future__ import annotations

import math
from itertools import pairwise

import naive
import pytest
import torch
from asking import ask
from clips import SEEDS, clip_sample, grid_of, on_videos
from plain import best, cosine, kept, shares
from selection_cost import share_of_prefill

import prunekit
from prunekit.families import shape_of
from prunekit.testing.tiny_families import tiny_model

globals().update(on_videos("fastvid", {"segments": 1, "tau": -1.0}))


def stage(**options):
    return prunekit.load({"stages": [{"use": "fastvid", **options}]}).stages[0]


def mean(rows):
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def loops(one, clip, tokens, attention, share, o):
    """The tokens of one clip that stay, with what they become."""
    frames = one.by_frame(clip)
    if share is None:
        budget = [max(int(len(frame) * o["ratio"] + 1e-9), 1) for frame in frames]
    else:
        budget = shares(share, [len(frame) for frame in frames])
    context = [int(b * o["d"] + 1e-9) for b in budget]
    middle = [mean([tokens[i] for i in frame]) for frame in frames]
    scene = naive.segments([cosine(a, b) for a, b in pairwise(middle)], o["tau"], o["segments"])
    state, rest = {}, []
    for frame, b, c in zip(frames, budget, context, strict=True):
        salient = best(frame, attention.__getitem__, b - c)
        state |= {i: tokens[i] for i in salient}
        rest.append([i for i in frame if i not in salient])
    for part in range(scene[-1] + 1):
        here = [t for t, own in enumerate(scene) if own == part]
        holds = [t for t in here if (here[-1] - t) % o["every"] == 0]
        total = sum(context[t] for t in here)
        number = {t: min(total // len(holds), len(rest[t])) if t in holds else 0 for t in here}
        if share is not None:
            weights = [float(t in holds) for t in here]
            number = dict(zip(here, naive.quotas(weights, total, [len(rest[t]) for t in here]), strict=True))
        pool = [i for t in here for i in rest[t]]
        for t in here:
            if not number[t]:
                continue
            apart = [[math.dist(tokens[i], tokens[j]) / math.sqrt(len(tokens[i])) for j in rest[t]] for i in rest[t]]
            joins = naive.density_peaks(apart, number[t], 4)
            anchors = [rest[t][k] for k in sorted(set(joins))]
            to = {i: best(anchors, lambda j, i=i: cosine(tokens[i], tokens[j]), 1)[0] for i in pool}
            for anchor in anchors:
                members = [tokens[i] for i in pool if to[i] == anchor]
                w = max(1 / (len(members) + 1), o["beta"])
                summed = mean(members) if members else [0.0] * len(tokens[anchor])
                state[anchor] = [w * a + (1 - w) * b for a, b in zip(tokens[anchor], summed, strict=True)]
    return state


@pytest.mark.parametrize("seed", SEEDS)
def test_as_loops(seed):
    """Tied samples are cut by the threshold alone, as equal frames are equally alike but for rounding."""
    one = clip_sample(seed)
    draw = one.draw
    options = {
        "ratio": draw.choice((0.1, 0.4, 0.8)), "tau": draw.choice((-1.0, 0.9)), "d": draw.choice((0.0, 0.4, 1.0)),
        "segments": 1 if one.tied else draw.randint(1, 4), "every": draw.choice((1, 2, 4)),
        "beta": draw.choice((0.0, 0.6)),
    }  # fmt: skip
    tokens, attention = one.vectors(4), one.numbers()
    hidden = torch.tensor(tokens, dtype=torch.float64)
    given = {"hidden": hidden, "encoder_attention": torch.tensor(attention, dtype=torch.float64)}
    for count in (None, one.count):
        stay, clips = one.clips(count)
        state = {i: tokens[i] for i in stay}
        for clip, share in clips:
            state |= loops(one, clip, tokens, attention, share, options)
        found = ask(stage(**options), "select_tokens", count=count, **given, **one.places)
        assert kept(found.keep) == sorted(state) and (count is None or len(state) == count)
        made = found.weights @ hidden
        for i, values in state.items():
            assert made[i].tolist() == pytest.approx(list(values), abs=1e-12)


def frames_of(frames, each):
    """A clip of one scene."""
    draws = torch.Generator().manual_seed(1)
    hidden = torch.randn(frames, each, 16, generator=draws) * 0.5 + 1
    given = {"hidden": hidden.flatten(0, 1), "encoder_attention": torch.rand(frames * each, generator=draws)}
    return given | grid_of(frames, 1, each)


@pytest.mark.parametrize(("segments", "left"), [(1, [12, 12, 12, 40] * 8), (32, [19] * 32)])
def test_how_many_stay(segments, left):
    """19 of 196 at 0.1, of which 7 are context: 28 in each fourth frame of one segment, or 7 in each of its own."""
    keep = ask(stage(segments=segments, tau=-1.0), "select_tokens", **frames_of(32, 196)).keep
    assert keep.view(32, 196).sum(1).tolist() == left


def test_a_budget_is_met():
    for count in (1, 20, 155, 239, 240):
        found = ask(stage(segments=2, d=0.6), "select_tokens", count=count, **frames_of(12, 20))
        assert int(found.keep.sum()) == count


def test_a_still_image_passes_without_a_budget():
    given = frames_of(1, 36) | {"videos": torch.zeros(36, dtype=torch.bool)}
    assert ask(stage(), "select_tokens", **given).keep.all()
    assert int(ask(stage(), "select_tokens", count=9, **given).keep.sum()) == 9


def test_half_precision_chooses_as_float32():
    given = frames_of(5, 16)
    hidden = (given["hidden"] * 300).half()
    half, wide = (ask(stage(), "select_tokens", count=30, **given | {"hidden": x}) for x in (hidden, hidden.float()))
    assert torch.equal(half.keep, wide.keep)


def test_what_it_costs_and_refuses():
    assert 0 < share_of_prefill("fastvid") < 0.02
    for wrong, said in (("ratio", "ratio: is 0"), ("d", "d: is 2"), ("beta", "beta: is 2"), ("every", "every: is 0")):
        with pytest.raises(prunekit.SpecError, match=said):
            stage(**{wrong: int(said[-1])})
    refused = prunekit.load({"stages": [{"use": "fastvid", "query": "pool"}]})
    with pytest.raises(prunekit.SpecError, match="this vision tower has no pooling head"):
        refused.bind(shape_of(tiny_model("qwen2_5_vl")))
