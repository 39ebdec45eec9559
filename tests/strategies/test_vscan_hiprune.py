"""VScan and HiPrune, which read the tower's attention twice: the authors' own choices, naive twins, refusals."""

from __future__ import annotations

import pytest
import torch
from asking import ask, cases, stage_of
from golden_files import drawn
from plain import SEEDS, best, cosine, kept, sample, spread
from transformers import LlavaConfig, LlavaForConditionalGeneration

import prunekit
from prunekit import ENCODER
from prunekit.families import shape_of
from prunekit.loading import load_shape
from prunekit.pipeline.forecast import forecast
from prunekit.strategy.tower_requests import resolved
from prunekit.testing.tiny import tiny_inputs, tiny_llava
from prunekit.testing.tiny_families import tiny_batch, tiny_model
from prunekit.verify.equivalence import assert_equivalent

both = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
WHOLE = {
    "coords": torch.tensor([(0, i // 24, i % 24, 24, 24) for i in range(576)]),
    "frames": torch.zeros(576, dtype=torch.int64),
}


def blocks_of(stage, blocks):
    """The tower blocks that it reads, in a tower of so many whose features are of the last but one."""
    return [resolved(one, ENCODER, blocks, blocks - 2).layer for one in stage.inputs["encoder_attention"]]


@pytest.mark.parametrize(("blocks", "local", "anchors"), [(2, 0, 0), (3, 0, 1), (12, 2, 4), (24, 5, 8), (27, 5, 9)])
def test_blocks_follow_the_depth_of_the_tower(blocks, local, anchors):
    assert blocks_of(stage_of("vscan"), blocks)[0] == local
    assert blocks_of(stage_of("hiprune"), blocks)[0] == anchors


@pytest.mark.parametrize("use", ["vscan", "hiprune"])
def test_they_run_on_the_bundled_model_as_they_are(use):
    prunekit.load({"stages": [{"use": use, "keep": 0.5}]}).bind(load_shape("micro"))


def means(selection, values: torch.Tensor) -> torch.Tensor:
    """The merged tokens of kept ones, group by group."""
    owner = selection.weights.owner
    assert selection.weights.mode == "mean"
    return torch.stack([values[owner == i].mean(0) for i in kept(selection.keep)])


@both
@pytest.mark.parametrize("case", cases("vscan_encoder", 4))
def test_vscan_as_its_authors(case, dtype):
    """Also with fewer left than asked for: 41 of 50. `exact` is the same wherever nothing is lost."""
    t, p, expected = drawn(case, dtype), case["params"], case["expected"]
    assert blocks_of(stage_of("vscan"), 24) == [5, 22]
    for image in range(p["images"]):
        rows = tuple(t[name][image].mean(0)[1:] for name in ("cls_row_5", "cls_row_22"))
        given = {"encoder_attention": rows, "hidden": t["features"][image], "count": p["keep"], **WHOLE}
        found = ask(stage_of("vscan", counts="official"), "select_tokens", **given)
        assert kept(found.keep) == expected["kept_sorted"][str(image)]
        assert int(found.keep.sum()) == expected["counts"][image]
        authors = torch.tensor(expected["features"][str(image)], dtype=dtype)
        torch.testing.assert_close(means(found, t["features"][image]), authors, rtol=2e-5, atol=2e-5)
        exact = ask(stage_of("vscan"), "select_tokens", **given).keep
        assert int(exact.sum()) == p["keep"] and not (found.keep & ~exact).any()


@pytest.mark.parametrize(("count", "left"), [(50, 41), (77, 71), (64, 64), (96, 96), (31, 16)])
def test_what_the_authors_rounding_leaves(count, left):
    rows = tuple(torch.rand(2, 576, generator=torch.Generator().manual_seed(count)))
    for counts, number in (("official", left), ("exact", count)):
        stage = stage_of("vscan", counts=counts)
        found = ask(stage, "select_tokens", encoder_attention=rows, hidden=torch.eye(576), count=count, **WHOLE)
        assert int(found.keep.sum()) == number


@both
@pytest.mark.parametrize("case", cases("hiprune", 4))
def test_hiprune_as_its_authors(case, dtype):
    t, p = drawn(case, dtype), case["params"]
    stage = stage_of("hiprune", alpha=p["alpha"], object_layer=p["object_layer"])
    middle, late = stage.inputs["encoder_attention"]
    assert (middle.layer, middle.query, late.layer, late.query) == (8, "mean", None, "mean")
    assert blocks_of(stage, 24) == blocks_of(stage_of("hiprune"), 24) == [8, 22]
    for image in range(p["images"]):
        rows = tuple(t[name][image].mean((0, 1))[1:] for name in ("attention_object", "attention_deep"))
        count = p["keep_total"] // p["images"]
        keep = ask(stage, "select_tokens", encoder_attention=rows, count=count, **WHOLE)
        assert kept(keep) == case["expected"]["kept_sorted"][str(image)]


@pytest.mark.parametrize("seed", SEEDS)
def test_vscan_as_loops(seed):
    one = sample(seed)
    early, late, tokens = one.numbers(), one.numbers(), one.vectors()
    official = one.draw.random() < 0.5
    chosen, owner = [], [-1] * len(one)
    for members, wanted in spread(one):
        local = []
        for window in range(16) if members != one.newlines else ():
            inside = []
            for i in members:
                _, row, column, rows, columns = one.coords[i]
                if (row * 4 // rows, column * 4 // columns) == divmod(window, 4):
                    inside.append(i)
            local += best(inside, early.__getitem__, wanted // 2 // 16)
        rest = wanted - wanted // 2 if official else wanted - len(local)
        stay = local + best((i for i in members if i not in local), late.__getitem__, rest)
        chosen += stay
        for i in members if stay else ():
            nearest = best(stay, lambda j, i=i: cosine(tokens[i], tokens[j]), 1)[0]
            owner[i] = i if i in stay else nearest
    stage = stage_of("vscan", counts="official" if official else "exact")
    found = ask(
        stage, "select_tokens", encoder_attention=(torch.tensor(early), torch.tensor(late)),
        hidden=torch.tensor(tokens).double(), count=one.count, **one.places,
    )  # fmt: skip
    assert kept(found.keep) == sorted(chosen)
    assert found.weights.owner.tolist() == owner
    assert official or len(chosen) == one.count


@pytest.mark.parametrize("seed", SEEDS)
def test_hiprune_as_loops(seed):
    one = sample(seed)
    middle, late = one.numbers(), one.numbers()
    alpha = one.draw.choice([0.0, 0.1, 0.5, 1.0])
    chosen = []
    for members, wanted in spread(one):
        anchors = best(members, middle.__getitem__, round(wanted * alpha / 5))
        around = set()
        for i in anchors:
            _, row, column, rows, columns = one.coords[i]
            place = row * columns + column
            steps = (place - 1, place + 1, place - columns, place + columns)
            around |= {min(max(step, 0), rows * columns - 1) for step in steps}
        near = [i for i in members if one.coords[i][1] * one.coords[i][4] + one.coords[i][2] in around]

        def order(i, anchors=anchors, near=near):
            return 9 * (i in anchors) + 3 * (i in near) + late[i]

        chosen += best(members, order, wanted)
    keep = ask(
        stage_of("hiprune", alpha=alpha), "select_tokens", count=one.count,
        encoder_attention=(torch.tensor(middle), torch.tensor(late)), **one.places,
    )  # fmt: skip
    assert kept(keep) == sorted(chosen) and len(chosen) == one.count


def test_neighbours_are_those_of_the_original_grid():
    """After another stage: of a 3 x 3 grid without its centre, the anchor's neighbours are where they were."""
    places = [(0, i // 3, i % 3, 3, 3) for i in range(9) if i != 4]
    rows = (torch.tensor([0.0, 1, 0, 0, 0, 0, 0, 0]), torch.tensor([0.9, 0, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]))
    keep = ask(
        stage_of("hiprune", alpha=1.0), "select_tokens", encoder_attention=rows, count=4, coords=torch.tensor(places),
        frames=torch.zeros(8, dtype=torch.int64),
    )  # fmt: skip
    assert kept(keep) == [0, 1, 2, 3]  # 1 with its neighbours 0 and 2; 4, below it, is gone; then 3, the next best


def test_the_two_stages_of_vscan_on_llava():
    """96 of 576 enter, 32 leave the middle layer; 64 on average."""
    stages = [{"use": "vscan", "keep_tokens": 96}, {"use": "vscan_decoder", "keep_tokens": 32}]
    with torch.device("meta"):
        shape = shape_of(LlavaForConditionalGeneration(LlavaConfig()))
    figures = forecast(prunekit.load({"stages": stages}).bind(shape), 0)
    assert figures.layer_tokens == (96,) * 16 + (32,) * 16 and sum(figures.layer_tokens) == 32 * 64
    assert stage_of("vscan_decoder").inputs["attention"].layer == "next"


def test_both_stages_are_exact_together():
    stages = [{"use": "vscan", "keep": 0.5}, {"use": "vscan_decoder", "keep": 0.25}]
    found = assert_equivalent(tiny_llava(), {"stages": stages}, tiny_inputs(images=(1, 2), text=(9, 5)), steps=2)
    assert [event.site for event in found.report.events] == ["encoder", "3"]


def test_refusals():
    shape = shape_of(tiny_llava())
    for use, option, block in (("vscan", {"shallow": 5}, 5), ("hiprune", {"object_layer": 9}, 8)):
        with pytest.raises(prunekit.SpecError, match=f"there is no block {block}: the vision tower has blocks 0 to 2"):
            prunekit.load({"stages": [{"use": use, "keep": 0.5, **option}]}).bind(shape)
    with pytest.raises(prunekit.SpecError, match="this vision tower has no CLS token"):
        prunekit.load({"stages": [{"use": "vscan", "keep": 0.5}]}).bind(shape_of(tiny_model("llava_onevision")))
    with pytest.raises(prunekit.SpecError, match="cannot act at '2'"):
        stage_of("vscan", at=2)
    with pytest.raises(prunekit.SpecError, match=r"alpha: is 1\.5; it is a share from 0 to 1"):
        stage_of("hiprune", alpha=1.5)
    with pytest.raises(prunekit.SpecError, match="object_layer: is 0; blocks are counted from 1 here"):
        stage_of("hiprune", object_layer=0)


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_vl", "gemma3"])
def test_hiprune_needs_no_cls(family):
    model = tiny_model(family)
    pipeline = {"stages": [{"use": "hiprune", "keep": 0.4}]}
    assert_equivalent(model, pipeline, tiny_batch(model), steps=2)
