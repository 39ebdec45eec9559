"""HoliTom and its second step: naive twins, windows by trial of all, figures, and videos of several families."""

from __future__ import annotations

import itertools
import math

import naive
import pytest
import torch
from asking import ask, stage_of
from clips import SEEDS, clip_sample, grid_of, model_of, on_videos
from plain import best, cosine, kept, shares
from selection_cost import share_of_prefill

import prunekit
from prunekit.testing.tiny_families import tiny_batch
from prunekit.verify.equivalence import assert_equivalent

globals().update(on_videos("holitom", {"tau": 0.0}))
globals().update(on_videos("holitom_decoder"))


def stage(**options):
    return prunekit.load({"stages": [{"use": "holitom", **options}]}).stages[0]


def mean(rows):
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def cuts(number):
    """Every way to cut so many frames into windows, those with the shortest last windows first."""
    for sizes in itertools.chain.from_iterable(
        itertools.product(range(1, number + 1), repeat=many) for many in range(1, number + 1)
    ):
        if sum(sizes) == number:
            yield tuple(sizes)


def loops(one, clip, tokens, attention, share, o):
    """Who joins whom in one clip, and the merged tokens."""
    begin = min(one.frames[i] for i in clip)
    at = {(one.coords[i][1:3], one.frames[i] - begin): i for i in clip}
    number, places = max(t for _, t in at) + 1, sorted({place for place, _ in at})

    def through(place, start, end):
        pairs = [(at.get((place, t)), at.get((place, t + 1))) for t in range(start, end)]
        return all(None not in pair and cosine(*(tokens[i] for i in pair)) > o["tau"] for pair in pairs)

    def windows(sizes):
        return [(sum(sizes[:k]), sum(sizes[: k + 1]) - 1) for k in range(len(sizes))]

    def saved(sizes):
        return sum(
            (end - start) * sum(through(p, start, end) for p in places) for start, end in windows(sizes) if end > start
        )

    most = max(map(saved, cuts(number)))
    chosen = min((sizes for sizes in cuts(number) if saved(sizes) == most), key=lambda sizes: sizes[::-1])
    still = [[p for p in places if end > start and through(p, start, end)] for start, end in windows(chosen)]
    held = {
        at[p, t]
        for some, (start, end) in zip(still, windows(chosen), strict=True)
        for p in some
        for t in range(start, end + 1)
    }
    moving = [[i for i in clip if one.frames[i] - begin == t and i not in held] for t in range(number)]
    groups = [*moving, *still]
    if share is None:
        ratio = min(o["ratio"] * len(clip) / sum(map(len, groups)), 1.0)
        quota = [math.ceil(ratio * len(some) - 1e-9) for some in moving] + [round(ratio * len(some)) for some in still]
    else:
        quota = shares(share, [len(some) for some in groups])
    owner, state = dict.fromkeys(clip, -1), {}
    for some, wanted in zip(moving, quota, strict=False):
        for i in best(some, attention.__getitem__, wanted):
            owner[i], state[i] = i, tokens[i]
    for some, (start, end), wanted in zip(still, windows(chosen), quota[number:], strict=True):
        if not wanted:
            continue
        middle = [mean([tokens[at[p, t]] for t in range(start, end + 1)]) for p in some]
        apart = [[math.dist(a, b) / math.sqrt(len(a)) for b in middle] for a in middle]
        joins = naive.density_peaks(apart, wanted, min(wanted, 7))
        for k in set(joins):
            others = [middle[j] for j, to in enumerate(joins) if to == k != j]
            centre = middle[k]
            if others:
                centre = [o["beta"] * a + (1 - o["beta"]) * b for a, b in zip(centre, mean(others), strict=True)]
            state[at[some[k], start]] = centre
        for j, k in enumerate(joins):
            for t in range(start, end + 1):
                owner[at[some[j], t]] = at[some[k], start]
    return owner, state


@pytest.mark.parametrize("seed", SEEDS)
def test_as_loops(seed):
    one = clip_sample(seed)
    draw = one.draw
    options = {
        "ratio": draw.choice((0.1, 0.4, 1.0)), "tau": draw.choice((-2.0, 0.2, 0.8)), "beta": draw.choice((0.6, 1.0)),
    }  # fmt: skip
    tokens, attention = one.vectors(4), one.numbers()
    hidden = torch.tensor(tokens, dtype=torch.float64)
    given = {"hidden": hidden, "encoder_attention": torch.tensor(attention, dtype=torch.float64)}
    for count in (None, one.count):
        stay, clips = one.clips(count)
        owner, state = {i: i for i in stay}, {i: tokens[i] for i in stay}
        for clip, share in clips:
            joins, states = loops(one, clip, tokens, attention, share, options)
            owner, state = owner | joins, state | states
        found = ask(stage(**options), "select_tokens", count=count, **given, **one.places)
        assert found.weights.owner.tolist() == [owner.get(i, -1) for i in range(len(one))]
        assert kept(found.keep) == sorted(state) and (count is None or len(state) <= count)
        for i in state:
            made = (hidden * found.weights.amounts[:, None])[found.weights.owner == i].sum(0)
            assert made.tolist() == pytest.approx(list(state[i]), abs=1e-12)


def still_clip(frames, each, still):
    """The first `still` places of every frame are alike."""
    draws = torch.Generator().manual_seed(7)
    hidden = torch.randn(frames, each, 24, generator=draws)
    hidden[:, :still] = hidden[:1, :still]
    given = {"hidden": hidden.flatten(0, 1), "encoder_attention": torch.rand(frames * each, generator=draws)}
    return given | grid_of(frames, 1, each)


@pytest.mark.parametrize(("frames", "each", "still", "left"), [
    (32, 196, 0, 32 * 30), (32, 196, 196, 196), (8, 100, 40, 8 * 14 + 9), (1, 196, 0, 30),
])  # fmt: skip
def test_how_many_stay(frames, each, still, left):
    """At 0.15. Of 800 tokens with 40 places that stand still, 280 are saved: 0.2308 of 60 a frame, and of the 40."""
    found = ask(stage(), "select_tokens", **still_clip(frames, each, still))
    assert int(found.keep.sum()) == left


def test_a_budget_is_met_where_enough_moves():
    given = still_clip(8, 20, 10)
    for count in (1, 7, 40, 90, 91, 159):
        assert int(ask(stage(), "select_tokens", count=count, **given).keep.sum()) == min(count, 8 * 10 + 10)


def test_a_still_image_passes_without_a_budget():
    given = still_clip(1, 36, 0) | {"videos": torch.zeros(36, dtype=torch.bool)}
    assert ask(stage(), "select_tokens", **given).keep.all()
    found = ask(stage(), "select_tokens", count=9, **given)
    assert kept(found.keep) == sorted(best(range(36), given["encoder_attention"].tolist().__getitem__, 9))


def test_half_precision_chooses_as_float32():
    given = still_clip(5, 16, 6)
    hidden = (given["hidden"] * 300).half()
    half, wide = (ask(stage(), "select_tokens", count=20, **given | {"hidden": x}) for x in (hidden, hidden.float()))
    assert torch.equal(half.weights.owner, wide.weights.owner)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_second_step_as_loops(seed):
    one = clip_sample(seed)
    tokens, attention = one.vectors(4), one.numbers()
    stay = sorted(best(range(len(one)), attention.__getitem__, one.count))
    state, owner = {i: list(tokens[i]) for i in stay}, {i: i for i in stay}
    for i in range(len(one)):
        if i not in stay:
            owner[i] = best(stay, lambda j, i=i: cosine(tokens[i], tokens[j]), 1)[0]
            state[owner[i]] = [(a + b) / 2 for a, b in zip(state[owner[i]], tokens[i], strict=True)]
    hidden = torch.tensor(tokens, dtype=torch.float64)
    found = ask(
        stage_of("holitom_decoder"), "select_tokens", count=one.count, hidden=hidden,
        attention=torch.tensor(attention, dtype=torch.float64),
    )  # fmt: skip
    assert kept(found.keep) == stay
    assert found.weights.owner.tolist() == [owner[i] for i in range(len(one))]
    for i in stay:
        made = (hidden * found.weights.amounts[:, None])[found.weights.owner == i].sum(0)
        assert made.tolist() == pytest.approx(state[i], abs=1e-12)


def test_both_steps_are_exact():
    model = model_of("qwen3_vl")
    stages = [{"use": "holitom", "keep": 0.6, "tau": 0.0}, {"use": "holitom_decoder", "keep": 0.3}]
    found = assert_equivalent(model, {"stages": stages}, tiny_batch(model, (("video",), ("image", "video"))), steps=2)
    assert [event.site for event in found.report.events] == ["encoder", "3"]


def test_what_it_costs_and_refuses():
    assert 0 < share_of_prefill("holitom") < 0.02 and 0 < share_of_prefill("holitom_decoder") < 0.02
    for name in ("ratio", "beta"):
        with pytest.raises(prunekit.SpecError, match=f"{name}: is 0"):
            stage(**{name: 0.0})
