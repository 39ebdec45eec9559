"""DART: the authors' choice with pivots in ascending order, a twin by loops, and counts."""

from __future__ import annotations

import pytest
import torch
from asking import cases, stage_of
from golden_files import drawn
from loops import SEEDS, best, cosine, kept, sizes, some

from prunekit import Keys, SpecError
from prunekit.testing.tiny import tiny_inputs, tiny_llava
from prunekit.verify.equivalence import assert_equivalent


def whole(states):
    """In the place of the final norm: goldens have states behind it."""
    return states


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", cases("dart", 4))
def test_the_authors_choice(case, dtype):
    p, t, expected = case["params"], drawn(case, dtype), case["expected"]
    stage = stage_of("dart", image_pivots=p["image_pivots"], text_pivots=p["text_pivots"])
    keys = t["keys"].transpose(0, 1).flatten(1)
    image = torch.arange(len(keys)) - p["image_start"]
    image, text = (image >= 0) & (image < p["visual_tokens"]), image >= p["visual_tokens"]
    # Text in front of the image is there too, and gives no pivot.
    found = kept(
        stage, expected["count"], keys=keys[image], text_keys=keys[~image], hidden=t["state"][image],
        text_hidden=t["state"][~image], text_after=text[~image], norm=whole,
    )  # fmt: skip
    assert found == expected["kept_sorted_ascending_pivots"]
    pivots = p["image_pivots"] + p["text_pivots"]
    assert expected["count"] == p["image_pivots"] + pivots * (p["target"] // pivots)


def twin(keys, text_keys, hidden, words, after, count, image_pivots, text_pivots):
    size = [sum(map(abs, key)) for key in keys]
    chosen = sorted(best(size, min(image_pivots, count)))
    behind = [i for i, one in enumerate(after) if one]
    words_size = [sum(map(abs, text_keys[i])) for i in behind]
    pivots = [hidden[i] for i in chosen] + [words[behind[i]] for i in sorted(best(words_size, text_pivots))]
    left = count - len(chosen)
    for turn, pivot in enumerate(pivots):
        others = [i for i in range(len(hidden)) if i not in chosen]
        take = left // len(pivots) + (1 if turn < left % len(pivots) else 0)
        alike = [-cosine(pivot, hidden[i]) for i in others]
        chosen += [others[i] for i in best(alike, take)]
    return sorted(chosen)


@pytest.mark.parametrize("seed", SEEDS)
def test_it_keeps_what_a_loop_keeps(seed):
    visual, count = sizes(seed)
    text, ties = 1 + seed % 7, seed % 4 == 0
    keys, text_keys = some(seed, visual, 6, ties=ties), some(seed + 100, text, 6, ties=ties)
    hidden, words = some(seed + 200, visual, 4), some(seed + 300, text, 4)
    after = torch.arange(text) >= (seed % 3)  # sometimes without any text behind the image
    numbers = {"image_pivots": 1 + seed % 4, "text_pivots": seed % 5}
    found = kept(
        stage_of("dart", **numbers), count, keys=keys, text_keys=text_keys, hidden=hidden, text_hidden=words,
        text_after=after, norm=whole,
    )  # fmt: skip
    lists = (one.tolist() for one in (keys, text_keys, hidden, words, after))
    assert found == twin(*lists, count, **numbers) and len(found) == count


def test_the_final_norm_is_applied():
    """States are compared behind it: this one makes the fifth token the opposite of the pivot."""
    hidden = torch.eye(6, 6).double()
    given = {
        "keys": torch.arange(6, 0, -1)[:, None].double(), "text_keys": torch.ones(1, 1).double(), "hidden": hidden,
        "text_hidden": hidden[:1], "text_after": torch.ones(1, dtype=torch.bool),
    }  # fmt: skip
    stage = stage_of("dart", image_pivots=1, text_pivots=0)
    assert kept(stage, 3, norm=whole, **given) == [0, 1, 2]
    assert kept(stage, 3, norm=lambda x: x[:, :1] - x[:, 4:5], **given) == [0, 1, 4]


@pytest.mark.parametrize(("target", "count"), [(192, 196), (128, 132), (64, 68)])
def test_the_authors_counts(target, count):
    """What their name for a budget really leaves, and its average over 32 layers."""
    assert 4 + 8 * (target // 8) == count
    assert (2 * 576 + 30 * count) / 32 == pytest.approx({196: 219.8, 132: 159.8, 68: 99.8}[count], abs=0.06)


def test_wrong_options():
    for name, least in (("image_pivots", 0), ("text_pivots", -1)):
        with pytest.raises(SpecError, match=f"{name}.*is at least {least + 1}"):
            stage_of("dart", **{name: least})
    assert stage_of("dart").inputs.get("keys", Keys()) == Keys(layer="previous", rope=True, heads="concat")


def test_it_is_exact_behind_another():
    stages = [{"use": "random", "keep": 0.75}, {"use": "dart", "keep": 0.5}]
    found = assert_equivalent(tiny_llava(), {"stages": stages}, tiny_inputs(images=(1, 2)), steps=3)
    assert [len(one) for one in found.report.events[-1].kept] == [8, 16]
