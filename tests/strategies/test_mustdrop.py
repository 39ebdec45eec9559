"""MustDrop: windows, thresholds and the key set by loops, its sites, both stages together, and refusals."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from asking import stage_of
from loops import decided, some
from plain import SEEDS, best, cosine, sample
from selection_cost import share_of_prefill

import prunekit
from prunekit import EncoderRows, Rows, SpecError
from prunekit.families import shape_of
from prunekit.testing.tiny import tiny_inputs, tiny_llava
from prunekit.testing.tiny_families import tiny_batch, tiny_model
from prunekit.verify.equivalence import assert_equivalent


@pytest.mark.parametrize("seed", SEEDS)
def test_windows_merge_as_in_loops(seed):
    """Images of any size, thinned or not; every second seed has tokens whose cosines are exact and often equal."""
    one = sample(seed, newlines=False, images=1)
    hidden, window, alike = one.vectors(), (3, 2, 1)[seed % 3], (0.8, 0.5, 0.0)[seed % 3]
    stage = stage_of("mustdrop_tower", window=window, alike=alike)
    found = decided(stage, None, hidden=torch.tensor(hidden, dtype=torch.float64), **one.places)
    windows = {}
    for i, (at, frame) in enumerate(zip(one.coords, one.frames, strict=True)):
        windows.setdefault((frame, at[1] // window, at[2] // window), []).append(i)
    owner = list(range(len(one)))
    for tokens in windows.values():
        pairs = [cosine(hidden[i], hidden[j]) for i, j in itertools.permutations(tokens, 2)]
        if pairs and sum(pairs) / len(pairs) >= alike - 1e-9:
            for i in tokens:
                owner[i] = max(tokens)
    assert found.weights.owner.tolist() == owner and found.weights.mode == "mean"
    assert found.keep.tolist() == [i == other for i, other in enumerate(owner)]


def test_a_picture_of_one_colour_leaves_a_token_of_each_window():
    """576 equal tokens become 64, the last of each window of 3 x 3."""
    coords = torch.tensor([(0, i // 24, i % 24, 24, 24) for i in range(576)])
    found = decided(stage_of("mustdrop_tower"), None, hidden=torch.ones(576, 4), coords=coords, frames=coords[:, 0])
    kept = found.keep.nonzero()[:, 0].tolist()
    assert kept == [24 * row + column for row in range(2, 24, 3) for column in range(2, 24, 3)]


@pytest.mark.parametrize("seed", SEEDS)
def test_it_drops_what_loops_drop(seed):
    """One image or several, crops and newlines, at two sites one after the other; thresholds of any height."""
    one = sample(seed)
    visual, words = len(one), 1 + seed % 4
    together, alone, key = (0.02, 0.1, 0.5)[seed % 3], (0.3, 0.05, 2.0)[seed // 3 % 3], (0.08, 0.4, 1.0)[seed // 2 % 3]
    stage = stage_of("mustdrop", together=together, alone=alone, key=key)
    received = [0.0 if at[1] < 0 else value for at, value in zip(one.coords, one.numbers(), strict=True)]
    chosen = set()
    for crop in one.crops:
        chosen |= set(best(crop, received.__getitem__, math.ceil(round(key * len(crop), 9))))
    left, state = list(range(visual)), {}
    for site in range(2):
        maps = (some(seed + site, words, len(left), ties=seed % 2 == 0).abs() / visual).tolist()
        total = [sum(column) for column in zip(*maps, strict=True)]
        most = [max(column) for column in zip(*maps, strict=True)]
        found = decided(
            stage, None, attention=tuple(torch.tensor(x, dtype=torch.float64) for x in (total, most)), state=state,
            encoder_attention=torch.tensor([received[i] for i in left], dtype=torch.float64), index=torch.tensor(left),
            **{name: value[left] for name, value in one.places.items()},
        )  # fmt: skip
        wanted = [
            i for n, i in enumerate(left) if total[n] >= together * sum(total) or most[n] >= alone or i in chosen
        ]
        left = [left[n] for n in found.keep.nonzero()[:, 0].tolist()]
        assert left == wanted and found.crop and found.weights is None


def test_the_key_set_of_a_whole_image():
    """ceil(0.08 * 576) = 47 tokens stay where no word attends to anything much."""
    coords = torch.tensor([(0, i // 24, i % 24, 24, 24) for i in range(576)])
    received = some(0, 576).abs()
    nothing = torch.zeros(576, dtype=torch.float64)
    much = nothing.clone()
    much[5] = 1
    found = decided(
        stage_of("mustdrop"), None, attention=(much, nothing), encoder_attention=received, coords=coords,
        frames=coords[:, 0], index=torch.arange(576), state={},
    )  # fmt: skip
    wanted = {*best(range(576), received.tolist().__getitem__, 47), 5}
    assert found.keep.nonzero()[:, 0].tolist() == sorted(wanted)
    silent = decided(
        stage_of("mustdrop"), None, attention=(nothing, nothing), encoder_attention=received, coords=coords,
        frames=coords[:, 0], index=torch.arange(576), state={},
    )  # fmt: skip
    assert bool(silent.keep.all()), "without text behind the image nothing tells what to drop"


@pytest.mark.parametrize(
    ("layers", "sites"), [(32, [2, 6, 10, 14]), (28, [2, 5, 9, 12]), (6, [0, 1, 2, 3]), (2, [0, 1])]
)
def test_the_sites_scale_with_depth(layers, sites):
    shape = dataclasses.replace(shape_of(tiny_llava()), layers=layers)
    cuts = prunekit.load({"stages": [{"use": "mustdrop"}]}).bind(shape).cuts
    assert [str(cut.site) for cut in cuts] == [f"{site}.after" for site in sites]


def test_what_it_reads():
    inputs = stage_of("mustdrop").inputs
    assert inputs["attention"] == tuple(Rows("own", "after", "mean", over) for over in ("sum", "max"))
    assert inputs["encoder_attention"] == EncoderRows(layer=-1, query="cls", heads="mean")


@pytest.mark.parametrize("positions", ["keep", "renumber"])
def test_both_stages_are_exact_together(positions):
    """Decoding sees in every layer what the last site left."""
    stages = [{"use": "mustdrop_tower", "alike": 0.0}, {"use": "mustdrop", "together": 0.25, "alone": 0.9}]
    pipeline = {"positions": positions, "stages": stages}
    found = assert_equivalent(tiny_llava(), pipeline, tiny_inputs(images=(1, 2), text=(9, 5)), steps=3)
    report = found.report
    assert [event.site for event in report.events] == ["vision.0", "0.after", "1.after", "2.after", "3.after"]
    assert report.layer_tokens[0][0] < 16 + 10 and report.layer_tokens[0][-1] < report.layer_tokens[0][1]
    assert all(set(row) == {layers[-1]} for row, layers in zip(report.kv_tokens, report.layer_tokens, strict=True))


@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl", "llava_onevision"])
def test_they_are_exact_elsewhere(name):
    """Crops with newlines; towers without CLS."""
    model = tiny_model(name)
    query = "cls" if name == "llava_next" else "mean"
    stages = [
        {"use": "mustdrop_tower", "alike": 0.2},
        {"use": "mustdrop", "together": 0.1, "alone": 0.1, "query": query, "at": ["0.after", "1.after"]},
    ]
    assert_equivalent(model, {"stages": stages}, tiny_batch(model), steps=2)


def test_what_is_refused():
    with pytest.raises(SpecError, match="this vision tower has no CLS token"):
        prunekit.load({"stages": [{"use": "mustdrop"}]}).bind(shape_of(tiny_model("qwen2_5_vl")))
    with pytest.raises(SpecError, match="'mustdrop' decides by itself and takes no `keep`"):
        stage_of("mustdrop", keep=0.5)
    with pytest.raises(SpecError, match="needs another point of the layer"):
        prunekit.load({"stages": [{"use": "mustdrop", "at": 2}]}).bind(shape_of(tiny_llava()))
    for use, options, said in (
        ("mustdrop", {"key": 0}, "key: is a part"), ("mustdrop_tower", {"window": 0}, "window: is at least 1")
    ):  # fmt: skip
        with pytest.raises(SpecError, match=said):
            stage_of(use, **options)


@pytest.mark.parametrize("use", ["mustdrop", "mustdrop_tower"])
def test_the_selection_is_cheap(use):
    assert 0 < share_of_prefill(use) < 0.02
