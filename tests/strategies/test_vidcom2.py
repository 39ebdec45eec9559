"""VidCom2: the authors' own choices, a naive twin, figures, and videos of several families."""

from __future__ import annotations

import math

import pytest
import torch
from asking import ask, cases, stage_of
from clips import SEEDS, clip_sample, grid_of, on_videos
from golden_files import drawn
from plain import best, kept, softmax
from selection_cost import share_of_prefill

import prunekit

globals().update(on_videos("vidcom2"))


def free(**options):
    """The stage without a budget."""
    return prunekit.load({"stages": [{"use": "vidcom2", **options}]}).stages[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", cases("vidcom2", 3))
def test_as_its_authors(case, dtype):
    p, t = case["params"], drawn(case, torch.float32)
    tokens = ((t["tokens"] + t["frame_mean"]) * t["channel_scale"]).to(dtype)
    keep = ask(
        free(base=p["base"]), "select_tokens", hidden=tokens.flatten(0, 1),
        **grid_of(p["frames"], 1, p["tokens_per_frame"]),
    )  # fmt: skip
    frames = keep.view(p["frames"], -1)
    assert {str(t): kept(frame) for t, frame in enumerate(frames)} == case["expected"]["kept_sorted"]
    assert frames.sum(1).tolist() == case["expected"]["counts"]


def centre(rows):
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def alike(x, c):
    apart = sum((a - b) ** 2 for a, b in zip(x, c, strict=True))
    return sum(math.exp(-apart / (2 * width)) for width in (1 / 8, 1 / 4, 1 / 2, 1, 2))


def chosen_of(one, clip, tokens, base, share):
    """The tokens of one clip that stay, and how redundant each is."""
    mean = centre([tokens[i] for i in clip])
    variance = [sum((tokens[i][c] - mean[c]) ** 2 for i in clip) / len(clip) for c in range(len(mean))]
    steady = best(range(len(mean)), lambda c: -variance[c], len(mean) // 2)
    x = {}
    for i in clip:
        part = [tokens[i][c] for c in sorted(steady)]
        length = math.sqrt(sum(a * a for a in part))
        x[i] = [a / length for a in part]
    video = {i: alike(x[i], centre(list(x.values()))) for i in clip}
    frames = one.by_frame(clip)
    redundant = {i: video[i] + alike(x[i], centre([x[j] for j in frame])) for frame in frames for i in frame}
    odd = softmax([-sum(video[i] for i in frame) / len(frame) / 0.01 for frame in frames])
    stay = []
    for frame, part in zip(frames, odd, strict=True):
        ratio = min(1.0, base * (1 + part - sum(odd) / len(odd)))
        stay += best(frame, lambda i: -redundant[i], max(1, round(ratio * len(frame))))
    if share is None:
        return stay, redundant
    rest = [i for i in clip if i not in stay]
    return [*best(stay, lambda i: -redundant[i], share), *best(rest, lambda i: -redundant[i], len(clip))][
        :share
    ], redundant


@pytest.mark.parametrize("seed", SEEDS)
def test_as_loops(seed):
    """Where two tokens are equally redundant but for rounding, either may stay."""
    one, redundant = clip_sample(seed), {}
    tokens = one.vectors(signs=False)
    for count in (None, one.count):
        chosen, clips = one.clips(count)
        for clip, share in clips:
            stay, scores = chosen_of(one, clip, tokens, 0.4 if share is None else share / len(clip), share)
            chosen, redundant = chosen + stay, redundant | scores
        hidden = torch.tensor(tokens, dtype=torch.float64)
        found = kept(ask(free(base=0.4), "select_tokens", hidden=hidden, count=count, **one.places))
        assert len(found) == len(chosen) and (count is None or len(chosen) == count)
        swapped = ([redundant[i] for i in {*some} - {*others}] for some, others in ((found, chosen), (chosen, found)))
        assert sorted(next(swapped)) == pytest.approx(sorted(next(swapped)), abs=1e-12)


def test_of_equal_tokens_the_first_stay():
    given = {"hidden": torch.ones(12, 6), **grid_of(4, 1, 3)}
    assert kept(ask(free(), "select_tokens", count=5, **given)) == [0, 1, 3, 6, 9]
    assert kept(ask(free(base=0.7), "select_tokens", **given)) == [0, 1, 3, 4, 6, 7, 9, 10]


def clip_of(frames, each, odd=0):
    """Frames that are all alike, but for `odd` of them."""
    draws = torch.Generator().manual_seed(3)
    tokens = torch.randn(1, each, 16, generator=draws, dtype=torch.float64).repeat(frames, 1, 1) * 0.1 + 1
    tokens[frames - odd :] += 20 * torch.randn(16, generator=draws, dtype=torch.float64)
    return {"hidden": tokens.flatten(0, 1), **grid_of(frames, 1, each)}


@pytest.mark.parametrize(("each", "frames", "base", "odd", "all_", "least", "most"), [
    (196, 32, 0.25, 0, 1568, 49, 49), (169, 64, 0.25, 0, 2688, 42, 42), (196, 32, 0.25, 1, 1553, 47, 96),
    (196, 32, 0.15, 1, 926, 28, 58),
])  # fmt: skip
def test_how_many_the_authors_keep(each, frames, base, odd, all_, least, most):
    """Of equal frames, and of one that is unlike all others."""
    keep = ask(free(base=base), "select_tokens", **clip_of(frames, each, odd)).view(frames, each).sum(1)
    assert (int(keep.sum()), int(keep.min()), int(keep.max())) == (all_, least, most)


@pytest.mark.parametrize(("each", "frames", "count"), [(256, 8, 204), (256, 1, 25), (48, 4, 4), (48, 4, 192)])
def test_a_budget_is_met(each, frames, count):
    assert int(ask(free(), "select_tokens", count=count, **clip_of(frames, each)).sum()) == count


def test_a_still_image_passes_without_a_budget_and_is_one_frame_with_one():
    given = clip_of(1, 36) | {"videos": torch.zeros(36, dtype=torch.bool)}
    assert ask(free(), "select_tokens", **given).all()
    video = ask(free(), "select_tokens", count=9, **clip_of(1, 36))
    assert kept(ask(free(), "select_tokens", count=9, **given)) == kept(video)


def test_half_precision_chooses_as_float32():
    given = clip_of(6, 25, 2)
    for dtype in (torch.float16, torch.bfloat16):
        hidden = (given["hidden"] * 400).to(dtype)
        half, wide = (
            ask(free(), "select_tokens", **given | {"hidden": one}, count=40) for one in (hidden, hidden.float())
        )
        assert torch.equal(half, wide)


def test_what_it_costs_and_refuses():
    assert share_of_prefill("vidcom2") < 0.02
    with pytest.raises(prunekit.SpecError, match=r"base: is 0\.0; it is a part, above 0 and up to 1"):
        stage_of("vidcom2", base=0)
