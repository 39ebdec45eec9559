"""The prefill part of DyCoke: a naive twin, figures, what is refused, and videos of several families."""

from __future__ import annotations

import pytest
import torch
from asking import ask
from clips import SEEDS, clip_sample, grid_of, on_videos
from plain import best, cosine, kept
from selection_cost import share_of_prefill

import prunekit

globals().update(on_videos("dycoke", keep=None))


def stage(**options):
    return prunekit.load({"stages": [{"use": "dycoke", **options}]}).stages[0]


@pytest.mark.parametrize("groups", ["complete", "official"])
@pytest.mark.parametrize("seed", SEEDS)
def test_as_loops(seed, groups):
    one = clip_sample(seed)
    tokens, k = one.vectors(), one.draw.choice((0.0, 0.5, 0.7, 0.9, 1.0))
    chosen, clips = one.clips(None)
    for clip, _ in clips:
        number = max(one.frames[i] for i in clip) + 1
        place = {(one.coords[i][1:3], one.frames[i]): i for i in clip}
        for frame in one.by_frame(clip):
            t = one.frames[frame[0]]
            lost = groups == "official" and number % 2 == 1 and t == number - 1
            whole = t % 4 == 0 or (groups == "official" and t % 4 == 2 and t + 2 >= number)
            back = 1 if t % 2 else 2

            def new(i, t=t, back=back, place=place):
                before = place.get((one.coords[i][1:3], t - back))
                return 9.0 if before is None else -cosine(tokens[i], tokens[before])

            chosen = chosen + best(frame, new, 0 if lost else len(frame) if whole else int((1 - k) * len(frame)))
    keep = ask(
        stage(k=k, groups=groups), "select_tokens", hidden=torch.tensor(tokens, dtype=torch.float64), **one.places
    )
    assert kept(keep) == sorted(chosen)


@pytest.mark.parametrize(("frames", "groups", "left"), [
    (32, "complete", 8 * 196 + 24 * 58), (32, "official", 9 * 196 + 23 * 58), (5, "official", 196 + 3 * 58),
    (1, "complete", 196), (2, "complete", 196 + 58), (8, "official", 3 * 196 + 5 * 58),
    (6, "official", 2 * 196 + 4 * 58),
])  # fmt: skip
def test_how_many_stay(frames, groups, left):
    """58 of 196 in frames that are compared. The authors miss a frame of the last four, and the last of five."""
    hidden = torch.randn(frames * 196, 8, generator=torch.Generator().manual_seed(0))
    assert int(ask(stage(groups=groups), "select_tokens", hidden=hidden, **grid_of(frames, 14, 14)).sum()) == left


def test_what_has_changed_stays():
    """Of frames that are alike but for two tokens, those, and the first of the others."""
    hidden = torch.ones(4, 10, 4)
    hidden[1, 7], hidden[2, 9] = -hidden[1, 7], -hidden[2, 9]
    keep = ask(stage(), "select_tokens", hidden=hidden.flatten(0, 1), **grid_of(4, 2, 5)).view(4, 10)
    assert [kept(frame) for frame in keep] == [list(range(10)), [0, 1, 7], [0, 1, 9], [0, 1, 9]]


def test_still_images_pass():
    given = grid_of(3, 2, 2) | {"videos": torch.zeros(12, dtype=torch.bool)}
    assert ask(stage(), "select_tokens", hidden=torch.ones(12, 4), **given).all()


def test_what_it_costs_and_refuses():
    assert share_of_prefill("dycoke") < 0.02
    with pytest.raises(prunekit.SpecError, match="DyCoke's choice of KV at every decoding step is not built"):
        stage(decode=0.7)
    with pytest.raises(prunekit.SpecError, match=r"k: is 1\.5; it is a part, from 0 to 1"):
        stage(k=1.5)
    with pytest.raises(prunekit.SpecError, match="keep"):
        stage(keep=0.5)
