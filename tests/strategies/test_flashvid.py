"""FlashVID: a naive twin, figures, merges by hand, and videos of several families."""

from __future__ import annotations

import math
from itertools import pairwise

import naive
import pytest
import torch
from asking import ask
from clips import SEEDS, clip_sample, grid_of, model_of, on_videos
from plain import best, cosine, kept, shares
from selection_cost import share_of_prefill

import prunekit
from prunekit.testing.tiny_families import tiny_batch
from prunekit.verify.equivalence import assert_equivalent

# Random frames are not alike: thresholds at which they are.
LOOSE = {"temporal": -0.5, "segment": -1.0, "segments": 1}
globals().update(on_videos("flashvid", LOOSE))


def stage(**options):
    return prunekit.load({"stages": [{"use": "flashvid", **options}]}).stages[0]


def mean(rows):
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def loops(one, clip, tokens, attention, share, o):
    """Who joins whom in one clip, and the merged tokens: {token: owner}, {kept token: state}."""
    frames = one.by_frame(clip)
    if share is None:
        budget = [min(math.ceil(len(frame) * o["ratio"] * o["expansion"] - 1e-9), len(frame)) for frame in frames]
    else:
        budget = shares(share, [len(frame) for frame in frames])
    chosen = [math.ceil(b * o["alpha"] - 1e-9) for b in budget]
    middle = [mean([tokens[i] for i in frame]) for frame in frames]
    scene = naive.segments([cosine(a, b) for a, b in pairwise(middle)], o["segment"], o["segments"])
    owner = dict.fromkeys(clip, -1)
    state = {}
    for part in range(scene[-1] + 1):
        here = [t for t, own in enumerate(scene) if own == part]
        about = mean([middle[t] for t in here])
        free = {}
        for t in here:
            apart = [[1 - cosine(tokens[i], tokens[j]) for j in frames[t]] for i in frames[t]]
            event = [sum(a * b for a, b in zip(tokens[i], about, strict=True)) for i in frames[t]]
            weights = [
                attention[i] * (e if o["method"] == "attn_div_v2" else 1) for i, e in zip(frames[t], event, strict=True)
            ]
            picked = [frames[t][i] for i in naive.max_min(apart, chosen[t], weights)]
            for i in picked:
                owner[i], state[i] = i, tokens[i]
            free[t] = [i for i in frames[t] if i not in picked]
        trees = in_time(tokens, frames, here, free, sum(budget[t] for t in here), o["temporal"])
        in_space(tokens, here, free, trees, sum(budget[t] - chosen[t] for t in here), share is not None, owner, state)
    return owner, state


def in_time(tokens, frames, here, free, least, threshold):
    """The tokens of each tree, by its root."""
    wish = {}
    for before, now in pairwise(here):
        for i in free[now] if free[before] else ():
            nearest = best(free[before], lambda j, i=i: cosine(tokens[i], tokens[j]), 1)[0]
            if cosine(tokens[i], tokens[nearest]) > threshold:
                wish[i] = (cosine(tokens[i], tokens[nearest]), nearest)
    room = sum(len(frames[t]) for t in here) - least
    joins = best(sorted(wish), lambda i: wish[i][0], max(room - 1, 0) if len(wish) > room else len(wish))
    root, trees = {}, {}
    for t in here:
        for i in free[t]:
            root[i] = root[wish[i][1]] if i in joins else i
            trees.setdefault(root[i], []).append(i)
    return trees


def in_space(tokens, here, free, trees, wanted, exact, owner, state):
    """The roots of each frame cluster."""
    roots = [[i for i in free[t] if i in trees] for t in here]
    total = sum(map(len, roots))
    if exact:
        clusters = shares(wanted, [len(some) for some in roots])
    else:
        clusters = [min(math.ceil(len(some) * wanted / max(total, 1) - 1e-9), len(some)) for some in roots]
    for some, number in zip(roots, clusters, strict=True):
        if not number:
            continue
        merged = [mean([tokens[j] for j in trees[i]]) for i in some]
        apart = [[math.dist(a, b) / math.sqrt(len(a)) for b in merged] for a in merged]
        joins = naive.density_peaks(apart, number, min(number, 7))
        for place in sorted(set(joins)):
            members = [k for k, own in enumerate(joins) if own == place]
            state[some[place]] = mean([merged[k] for k in members])
            for k in members:
                for j in trees[some[k]]:
                    owner[j] = some[place]


def merged_by(selection, tokens):
    """What stands in the slots of kept tokens."""
    owner, amounts = selection.weights.owner, selection.weights.amounts
    assert selection.weights.mode == "sum"
    return {i: (tokens * amounts[:, None])[owner == i].sum(0).tolist() for i in kept(selection.keep)}


@pytest.mark.parametrize("seed", SEEDS)
def test_as_loops(seed):
    """Tied samples are compared without e_j, and cut by the threshold alone, whose numbers are exact."""
    one = clip_sample(seed)
    draw = one.draw
    options = {
        "ratio": draw.choice((0.1, 0.3, 0.6)), "expansion": 1.25, "alpha": draw.choice((0.3, 0.7, 1.0)),
        "temporal": draw.choice((0.2, 0.8)), "segment": draw.choice((-1.0, 0.9)),
        "segments": 1 if one.tied else draw.randint(1, 4), "method": "attn_div" if one.tied else "attn_div_v2",
    }  # fmt: skip
    tokens, attention = one.vectors(4), one.numbers()
    given = {
        "hidden": torch.tensor(tokens, dtype=torch.float64),
        "encoder_attention": torch.tensor(attention, dtype=torch.float64),
    }
    for count in (None, one.count):
        stay, clips = one.clips(count)
        owner, state = {i: i for i in stay}, {i: tokens[i] for i in stay}
        for clip, share in clips:
            joins, states = loops(one, clip, tokens, attention, share, options)
            owner, state = owner | joins, state | states
        found = ask(stage(**options), "select_tokens", count=count, **given, **one.places)
        assert found.weights.owner.tolist() == [owner.get(i, -1) for i in range(len(one))]
        assert kept(found.keep) == sorted(state) and (count is None or len(state) == count)
        for i, values in merged_by(found, given["hidden"]).items():
            assert values == pytest.approx(list(state[i]), abs=1e-12)


@pytest.mark.parametrize(("each", "frames", "ratio", "selected", "bound"), [
    (196, 32, 0.10, 18, 800), (196, 32, 0.15, 26, 1184), (196, 32, 0.20, 35, 1568), (196, 32, 0.25, 44, 1984),
    (169, 64, 0.10, 16, 1408),
])  # fmt: skip
def test_how_many_stay(each, frames, ratio, selected, bound):
    """Of random frames nothing merges in time: b of each, and by the rounding of clusters up to one more."""
    draws = torch.Generator().manual_seed(each)
    hidden = torch.randn(frames * each, 8, generator=draws)
    given = {"hidden": hidden, "encoder_attention": torch.rand(len(hidden), generator=draws)}
    found = ask(stage(ratio=ratio), "select_tokens", **given, **grid_of(frames, 1, each))
    assert bound <= int(found.keep.sum()) <= bound + frames
    alone = ask(stage(ratio=ratio, alpha=1.0), "select_tokens", **given, **grid_of(frames, 1, each))
    assert int(alone.keep.sum()) == bound
    assert math.ceil(0.7 * bound / frames) == selected


def test_a_token_that_never_changes_becomes_its_own_mean():
    """However many frames it stands in, while others change: the authors' count makes it longer."""
    frames, each = 8, 4
    hidden = torch.randn(frames, each, 16, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    hidden[:, 2] = hidden[0, 2]
    tokens = hidden.flatten(0, 1)
    attention = torch.ones(frames, each).double()
    attention[:, 2] = 1e-9
    given = {"hidden": tokens, "encoder_attention": attention.flatten()}
    # Two of a frame's four tokens are selected, one cluster is left to it; the first frame has two roots, which stay.
    options = {"segment": -1.0, "segments": 1, "ratio": 0.6, "alpha": 0.66, "method": "attn_div"}
    found = ask(stage(**options), "select_tokens", **given, **grid_of(frames, 1, each))
    joined = [i for i in range(frames * each) if found.weights.owner[i] == 2]
    assert joined == [2 + each * t for t in range(frames)]
    assert merged_by(found, tokens)[2] == pytest.approx(tokens[2].tolist())


def test_a_still_image_passes_without_a_budget():
    hidden = torch.randn(36, 8, generator=torch.Generator().manual_seed(0))
    given = {"hidden": hidden, "encoder_attention": torch.rand(36)} | grid_of(1, 6, 6)
    given["videos"] = torch.zeros(36, dtype=torch.bool)
    assert ask(stage(), "select_tokens", **given).keep.all()
    assert int(ask(stage(), "select_tokens", count=9, **given).keep.sum()) == 9


def test_half_precision_chooses_as_float32():
    hidden = (torch.randn(96, 32, generator=torch.Generator().manual_seed(2)) * 300).half()
    given = {"encoder_attention": torch.rand(96, generator=torch.Generator().manual_seed(3)), **grid_of(6, 4, 4)}
    half, wide = (ask(stage(), "select_tokens", hidden=x, count=30, **given) for x in (hidden, hidden.float()))
    assert torch.equal(half.weights.owner, wide.weights.owner)


def test_both_stages_are_exact():
    model = model_of("qwen2_5_vl")
    stages = [{"use": "flashvid", "keep": 0.6, **LOOSE}, {"use": "fastv", "at": 4, "keep": 0.3, "keep_of": "current"}]
    assert_equivalent(model, {"stages": stages}, tiny_batch(model, (("video",), ("image", "video"))), steps=2)


def test_what_it_costs_and_refuses():
    assert 0 < share_of_prefill("flashvid") < 0.02
    for wrong, said in (("ratio", "ratio: is 0"), ("alpha", "alpha: is 0"), ("expansion", "expansion: is 0")):
        with pytest.raises(prunekit.SpecError, match=said):
            stage(**{wrong: 0.0})
