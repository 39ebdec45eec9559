"""FasterVLM, VisPruner, VisionZip, PruMerge, PruMerge+, HoloV: authors' choices, loops over lists, what is refused."""

from __future__ import annotations

import math
from random import Random
from typing import Any

import naive
import pytest
import torch
from asking import ask, cases, stage_of
from golden_files import drawn
from layouts import Layout, drawn_count, drawn_features, drawn_layout, drawn_scores, grid, layout
from selection_cost import share_of_prefill
from torch import Tensor

import prunekit
from prunekit import EncoderKeys, EncoderRows, Features, Selection, SpecError
from prunekit.testing.contract import contract
from prunekit.testing.subject import BATCHES
from prunekit.testing.tiny import tiny_inputs, tiny_llava
from prunekit.testing.tiny_families import tiny_batch, tiny_model
from prunekit.verify.equivalence import assert_equivalent

both_precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
seeds = pytest.mark.parametrize("seed", range(60))


def square(tokens: int, images: int = 1) -> Layout:
    side = math.isqrt(tokens)
    rows, columns = (side, side) if side * side == tokens else (5, tokens // 5)
    return layout([one for image in range(images) for one in grid(rows, columns, image)])


def select(use: str, where: Layout, count: int | None, options: dict | None = None, **given: Any) -> Selection:
    """What the strategy's `select_tokens` says where nothing stands between tower and decoder."""
    stage = stage_of(use, **(options or {}))
    given = {"cls_crops": torch.empty(0, 2, dtype=torch.int64), "project": lambda states: states, **given}
    answer = ask(stage, "select_tokens", **where.places_as_named, **given, count=count)
    return answer if isinstance(answer, Selection) else Selection(answer)


def kept(selection: Selection) -> list[int]:
    return selection.keep.nonzero()[:, 0].tolist()


def merged(selection: Selection, states: Tensor) -> Tensor:
    """The states (V, W) that stand in the slots of kept tokens."""
    whole = torch.cat([states, selection.extras.to(states)])
    return (selection.weights.to(states) @ whole)[selection.keep]


# FasterVLM


@both_precisions
@pytest.mark.parametrize("case", cases("fastervlm", 3))
def test_fastervlm_as_its_authors(case, dtype):
    params, rows = case["params"], drawn(case, dtype)["cls_row"]
    stage = stage_of("fastervlm")
    assert not stage.inputs and (EncoderRows().query, EncoderRows().heads) == ("cls", "mean")  # the default request
    where = square(params["patches"], params["images"])
    chosen = select(
        "fastervlm", where, params["keep"] * params["images"], encoder_attention=rows[:, :, 1:].mean(1).flatten()
    )
    for image, expected in case["expected"]["kept_sorted"].items():
        first = int(image) * params["patches"]
        assert [i - first for i in kept(chosen) if first <= i < first + params["patches"]] == expected


def shares(where: Layout, count: int) -> list[tuple[list[int], int]]:
    """Tokens of each crop with its share of the budget; newlines come last and stay only where nothing else can."""
    _, quota = naive.crop_quotas(where.coords.tolist(), where.frames.tolist(), count)
    crops = where.crops()
    return list(zip([*crops, where.newlines()][: len(quota)], quota, strict=True))


@seeds
def test_fastervlm_as_loops(seed):
    rng = Random(seed)
    where = drawn_layout(rng)
    attention, count = drawn_scores(rng, len(where)), drawn_count(rng, len(where))
    if seed % 2:
        attention[where.newlines()] = 0
    expected = [
        i for tokens, share in shares(where, count) for i in naive.best_first(tokens, lambda i: attention[i])[:share]
    ]
    assert kept(select("fastervlm", where, count, encoder_attention=attention)) == sorted(expected)
    assert len(expected) == count


# VisPruner


@both_precisions
@pytest.mark.parametrize("case", cases("vispruner", 6))
def test_vispruner_as_its_authors(case, dtype):
    tensors, params = drawn(case, dtype), case["params"]
    chosen = select(
        "vispruner", square(params["patches"]), params["keep"], {"important": params["important_ratio"]},
        encoder_attention=tensors["cls_row"][:, 1:].mean(0), features=tensors["features"],
    )  # fmt: skip
    assert kept(chosen) == case["expected"]["kept_sorted"]


def vispruner(tokens: list[int], share: int, attention, cosines, important: float) -> list[int]:
    order = naive.best_first(tokens, lambda i: attention[i])
    first = int(share * important)
    chosen, left = order[:first], order[first:]
    while len(left) > share - first and share > first:
        even, odd = [left[i] for i in range(0, len(left), 2)], [left[i] for i in range(1, len(left), 2)]
        alike = {i: max(cosines[i][j] for j in odd) for i in even}
        falling = sorted(even, key=lambda i: -alike[i])  # equal ones stay in the order that they have
        for _ in range(8):
            if len(falling) + len(odd) > share - first and falling:
                falling.pop(0)
        left = falling + odd
    return chosen + left[: share - first]


@seeds
def test_vispruner_as_loops(seed):
    """Odd numbers of tokens too, at which the authors' code fails."""
    rng = Random(seed)
    where, important = drawn_layout(rng), rng.choice([0.0, 0.25, 0.5, 0.75, 1.0])
    if seed % 3 == 0:
        where = layout(grid(7, rng.randint(5, 7)))
    attention, features = drawn_scores(rng, len(where)), drawn_features(rng, len(where))
    count, cosines = drawn_count(rng, len(where)), naive.cosine(features.tolist(), features.tolist())
    parts = shares(where, count)
    expected = [i for part, share in parts for i in vispruner(part, share, attention, cosines, important)]
    found = select("vispruner", where, count, {"important": important}, encoder_attention=attention, features=features)
    assert kept(found) == sorted(expected)


def test_fastervlm_is_vispruner_with_important_tokens_alone():
    rng = Random(1)
    for _ in range(20):
        where = drawn_layout(rng)
        attention, features = drawn_scores(rng, len(where)), drawn_features(rng, len(where))
        count = drawn_count(rng, len(where))
        given = {"encoder_attention": attention, "features": features}
        one = select("vispruner", where, count, {"important": 1.0}, **given)
        assert kept(one) == kept(select("fastervlm", where, count, encoder_attention=attention))


def test_vispruner_for_towers_without_cls():
    """`query: mean` reads what all patches of the last block attend to; without it SigLIP is refused readably."""
    model, batch = tiny_model("paligemma"), dict(tiny_batch(tiny_model("paligemma")))
    assert_equivalent(model, {"stages": [{"use": "vispruner", "query": "mean", "keep": 0.5}]}, batch, steps=2)
    with pytest.raises(SpecError, match="this vision tower has no CLS token"):
        prunekit.apply(model, {"stages": [{"use": "vispruner", "keep": 0.5}]}).__enter__()
    with pytest.raises(SpecError, match="important: is a part, from 0 to 1"):
        stage_of("vispruner", important=1.5)


# VisionZip


@both_precisions
@pytest.mark.parametrize("case", cases("visionzip", 4))
def test_visionzip_as_its_authors(case, dtype):
    """Dominant patches in raster order, contextual tokens by their targets; CLS is one of the tokens."""
    tensors, params, expected = drawn(case, dtype), case["params"], case["expected"]
    stage, count = stage_of("visionzip"), params["dominant"] + params["contextual"]
    assert stage.inputs == {"encoder_attention": EncoderRows(heads="sum"), "features": (Features(), Features(of="cls"))}
    patches, cls = tensors["hidden"][1:], tensors["hidden"][:1]
    chosen = select(
        "visionzip", square(params["patches"]), count, {"contextual": params["contextual"] / count},
        encoder_attention=tensors["cls_row"][:, 1:].sum(0), encoder_keys=tensors["keys"][:, 1:].mean(0),
        cls_crops=torch.tensor([[0, 0]]), features=(patches, cls),
    )  # fmt: skip
    assert len(kept(chosen)) == count == expected["count_out"]
    targets, states = expected["derived_contextual_target_patches"], merged(chosen, patches)
    (slot,) = [i for i in kept(chosen) if torch.equal(states[kept(chosen).index(i)], cls[0])]
    others = [i for i in kept(chosen) if i != slot]
    assert [i for i in others if i not in targets] == expected["dominant_patches_sorted"]
    assert [i for i in others if i not in expected["dominant_patches_sorted"]] == targets
    assert slot == min(set(range(params["patches"])) - set(others))
    found = states[[kept(chosen).index(i) for i in targets]]
    authors = torch.tensor(expected["contextual"], dtype=dtype)
    assert ((found - authors).abs() <= 2e-5 * (1 + authors.abs())).all()
    alone = [kept(chosen).index(i) for i in expected["dominant_patches_sorted"]]
    assert torch.equal(states[alone], patches[expected["dominant_patches_sorted"]])


@pytest.mark.parametrize(("count", "dominant"), [(64, 54), (128, 108), (192, 162)])
def test_visionzip_splits_as_in_the_tables(count, dominant):
    """Of 64 tokens CLS, 53 patches and 10 contextual ones, and so on."""
    rng = torch.Generator().manual_seed(0)
    attention, keys = torch.rand(576, generator=rng), torch.randn(576, 8, generator=rng)
    given = {"encoder_attention": attention, "encoder_keys": keys, "cls_crops": torch.tensor([[0, 0]])}
    chosen = select("visionzip", square(576), count, features=(keys, torch.zeros(1, 8)), **given)
    assert len(kept(chosen)) == count and len(chosen.extras) == count - dominant + 1  # contextual ones, and CLS


def visionzip(tokens, share, attention, cosines, contextual, cls):
    """Kept tokens with what is summed into each, {token: {token: factor}}, and the slot of CLS."""
    if not share:
        return {}, None
    merges = min(int(contextual * share + 0.5), share - 1)
    dominant = naive.best_first(tokens, lambda i: attention[i])[: share - merges - cls]
    rest = [i for i in tokens if i not in dominant]
    targets = [rest[i] for i in range(0, len(rest), max(len(rest) // merges, 1))][:merges] if merges else []
    slots = {i: {i: 1.0} for i in [*dominant, *targets]}
    joining = {}
    for i in rest:
        if i not in targets and targets:
            joining[i] = naive.best_first(targets, lambda j, i=i: cosines[i][j])[0]
    for i, target in joining.items():
        slots[target][i] = 1 / list(joining.values()).count(target)
    return slots, next(i for i in rest if i not in targets) if cls else None


@seeds
@pytest.mark.parametrize("cls", [True, False])
def test_visionzip_as_loops(seed, cls):
    rng = Random(seed)
    where, contextual = drawn_layout(rng), rng.choice([0.0, 0.15625, 0.5])
    attention, keys = drawn_scores(rng, len(where)), drawn_features(rng, len(where))
    count, cosines = drawn_count(rng, len(where)), naive.cosine(keys.tolist(), keys.tolist())
    names = [tuple(map(int, (where.coords[crop[0], 0], where.frames[crop[0]]))) for crop in where.crops()]
    extras = [(7, 7), *names] if cls else []  # the first is of a crop that an earlier stage has emptied
    states = torch.randn(
        len(where) + len(extras), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    found = select(
        "visionzip", where, count, {"contextual": contextual, "cls": cls}, encoder_attention=attention,
        encoder_keys=keys, cls_crops=torch.tensor(extras, dtype=torch.int64).view(-1, 2),
        features=(states[: len(where)], states[len(where) :]),
    )  # fmt: skip
    matrix = torch.zeros(len(where), len(where) + len(extras), dtype=torch.float64)
    staying = []
    for number, (tokens, share) in enumerate(shares(where, count)):
        if number == len(names):  # newlines
            slots, slot = {i: {i: 1.0} for i in naive.best_first(tokens, lambda i: attention[i])[:share]}, None
        else:
            slots, slot = visionzip(tokens, share, attention, cosines, contextual, cls and share < len(tokens))
        for i, parts in slots.items():
            for j, factor in parts.items():
                matrix[i, j] = factor
        if slot is not None:
            matrix[slot, len(where) + 1 + number] = 1
        staying += [*slots, *([] if slot is None else [slot])]
    assert kept(found) == sorted(staying) and len(staying) == count
    assert torch.allclose(merged(found, states[: len(where)]), (matrix @ states)[sorted(staying)], atol=1e-12)


def test_visionzip_may_average():
    """`merge: mean`: a target and what joins it have the same weight."""
    rng = Random(3)
    where = layout(grid(5, 5))
    ones, none = torch.ones(25, 1, dtype=torch.float64), torch.empty(0, 1, dtype=torch.float64)
    given = {
        "encoder_attention": drawn_scores(rng, 25),
        "encoder_keys": drawn_features(rng, 25),
        "features": (ones, none),
    }
    options = {"cls": False, "contextual": 0.5}
    added, mean = (select("visionzip", where, 6, {**options, "merge": how}, **given) for how in ("add", "mean"))
    assert kept(added) == kept(mean)
    assert torch.allclose(merged(mean, ones), torch.ones(6, 1, dtype=torch.float64))
    assert sorted(merged(added, ones).flatten().tolist())[-1] == pytest.approx(2)


class TestVisionZipWithoutCls(contract("visionzip", {"cls": False})):
    """Patches alone."""


def test_visionzip_on_tiles():
    """LLaVA-NeXT: every crop has a CLS token of its own."""
    model = tiny_model("llava_next")
    batch = dict(tiny_batch(model, [("image",), ("image", "image")]))
    assert_equivalent(model, {"stages": [{"use": "visionzip", "keep": 0.4}]}, batch, steps=2)


def test_where_visionzip_cannot_be():
    with pytest.raises(SpecError, match=r"cannot act at 'vision\.1'"):
        prunekit.load({"stages": [{"use": "visionzip", "at": "vision.1", "keep": 0.5}]})
    with pytest.raises(SpecError, match="there is no projector here that maps single tokens"):
        prunekit.apply(tiny_model("internvl"), {"stages": [{"use": "visionzip", "keep": 0.5}]}).__enter__()


# PruMerge, PruMerge+


def prumerge_inputs(case, dtype):
    tensors, params = drawn(case, dtype), case["params"]
    logits = tensors["q"][0] @ tensors["k"].T / params["dim"] ** 0.5
    given = {"encoder_attention": logits.softmax(-1)[1:], "encoder_keys": tensors["k"][1:, None]}
    return tensors["hidden"][1:], {**given, "features": tensors["hidden"][1:]}


@both_precisions
@pytest.mark.parametrize(
    ("use", "case"),
    [
        pytest.param(use, *one.values, id=f"{use}-{one.id}")
        for use, n in (("prumerge", 4), ("prumerge_plus", 2))
        for one in cases(use, n)
    ],
)
def test_prumerge_as_its_authors(use, case, dtype):
    """Kept tokens with their merged features, and the one that the rest becomes."""
    params, expected = case["params"], case["expected"]
    assert stage_of(use).inputs == {
        "encoder_attention": EncoderRows(layer=-1, heads="joined"), "encoder_keys": EncoderKeys(layer=-1, heads="none"),
    }  # fmt: skip
    states, given = prumerge_inputs(case, dtype)
    count = None if params["adaptive"] else int(params["patches"] * params["ratio"]) + 1
    chosen = select(use, square(params["patches"]), count, **given)
    slots = kept(chosen)
    (rest,) = [i for i in slots if i not in expected["kept_sorted"]]
    assert sorted([*expected["kept_sorted"], rest]) == slots and len(slots) == expected["count_out"]
    assert rest == max(set(range(params["patches"])) - set(expected["kept_sorted"]))
    emitted = [slots.index(i) for i in [*expected["kept_in_emission_order"], rest]]
    authors = torch.tensor(expected["features"], dtype=dtype)
    assert ((merged(chosen, states)[emitted] - authors).abs() <= 2e-5 * (1 + authors.abs())).all()


def prumerge(where, tokens, share, attention, cosines, near, plus):
    """As `visionzip` above; share: None for outliers."""
    if share == len(tokens):
        return {i: {i: 1.0} for i in tokens}
    order = naive.best_first(tokens, lambda i: attention[i])
    if share is None:
        outlying = max(sum(naive.outliers([float(attention[i]) for i in tokens])), 1)
        stay = set(order[:outlying])
        if plus:
            places = {i: (y * w + x, h * w) for i, (_, y, x, h, w) in enumerate(where.coords.tolist())}
            step = max(len(tokens) // outlying // 3, 1)
            stay |= {i for i in tokens if places[i][0] in range(0, places[i][1] - 1, step)}
    else:
        first = math.ceil((share - 1) / 4) if plus else share - 1
        stay = set(order[:first])
        others, wanted = [i for i in tokens if i not in stay], share - 1 - first
        stay |= {others[int((k + 0.5) * len(others) / wanted)] for k in range(wanted)}
    slots = {}
    for i in stay:
        nearest = naive.best_first([j for j in tokens if j != i], lambda j, i=i: cosines[i][j])[:near]
        slots[i] = {i: 1.0, **{j: float(attention[j]) for j in nearest}}
    if dropped := [i for i in tokens if i not in stay]:
        slots[dropped[-1]] = {j: float(attention[j]) for j in dropped}
    return slots


@seeds
@pytest.mark.parametrize("use", ["prumerge", "prumerge_plus"])
@pytest.mark.parametrize("budget", [True, False])
def test_prumerge_as_loops(seed, use, budget):
    rng = Random(seed)
    where, near = drawn_layout(rng), rng.choice([1, 4, 32])
    attention, keys = drawn_scores(rng, len(where)) ** 3, drawn_features(rng, len(where))
    attention[where.newlines()] = 0
    cosines = naive.cosine(keys.tolist(), keys.tolist())
    count = drawn_count(rng, len(where)) if budget else None
    slots = {}
    if budget:
        for number, (tokens, share) in enumerate(shares(where, count)):
            newlines = number == len(where.crops())
            if newlines:
                slots |= {i: {i: 1.0} for i in tokens[:share]}
            elif share:
                slots |= prumerge(where, tokens, share, attention, cosines, near, use == "prumerge_plus")
        assert len(slots) == count
    else:
        for tokens in where.crops():
            slots |= prumerge(where, tokens, None, attention, cosines, near, use == "prumerge_plus")
    states = torch.randn(len(where), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    given = {"encoder_attention": attention, "encoder_keys": keys[:, None], "features": states}
    found = select(use, where, count, {"neighbours": near}, **given)
    assert kept(found) == sorted(slots)
    sums = torch.stack([sum(factor * states[j] for j, factor in slots[i].items()) for i in sorted(slots)])
    assert torch.allclose(merged(found, states), sums, atol=1e-12)


class TestPruMergeByOutliers(contract("prumerge", keep={})):
    """Without a budget it decides by itself."""


class TestPruMergePlusByOutliers(contract("prumerge_plus", keep={})):
    """The same."""


@pytest.mark.parametrize("use", ["prumerge", "prumerge_plus"])
def test_prumerge_takes_no_tower_site_and_needs_cls(use):
    with pytest.raises(SpecError, match="needs 'encoder'"):
        prunekit.load({"stages": [{"use": use, "at": "vision.1", "keep": 0.5}]})
    with pytest.raises(SpecError, match="this vision tower has no CLS token"):
        prunekit.apply(tiny_model("paligemma"), {"stages": [{"use": use}]}).__enter__()


# HoloV


@both_precisions
@pytest.mark.parametrize("case", cases("holov", 4))
def test_holov_as_its_authors(case, dtype):
    """Where their code appends zero vectors, more tokens of the other runs stay."""
    tensors, params, expected = drawn(case, dtype), case["params"], case["expected"]
    where = layout(grid(10, 15)) if params["patches"] == 150 else square(params["patches"])
    given = {"encoder_attention": tensors["attention"], "hidden": tensors["tokens"]}
    chosen = kept(select("holov", where, params["keep"], {"chunks": params["chunks"]}, **given))
    assert len(chosen) == params["keep"] and set(expected["kept_sorted"]) <= set(chosen)
    assert len(chosen) - len(expected["kept_sorted"]) == expected["zero_vectors"]


def holov(where, tokens, share, attention, cosines, chunks):
    _, _, _, rows, columns = where.coords[tokens[0]].tolist()
    lengths = [rows * columns // chunks + (i < rows * columns % chunks) for i in range(chunks)]
    run_of = [run for run, length in enumerate(lengths) for _ in range(length)]
    runs = [[] for _ in range(chunks)]
    for i in tokens:
        runs[run_of[int(where.coords[i, 1]) * columns + int(where.coords[i, 2])]].append(i)
    variance = dict.fromkeys(tokens, 0.0)
    for run in runs:
        for i in run if len(run) > 1 else []:
            alike = [cosines[i][j] if i != j else 0.0 for j in run]
            mean = sum(alike) / (len(run) - 1)
            variance[i] = sum((one - mean) ** 2 for one in alike) / (len(run) - 1)
    loud = {i: 1000 * float(attention[i]) for i in tokens}
    means = []
    for run in runs:
        scale = sum(loud[i] for i in run) / (sum(variance[i] for i in run) + 1e-6 * len(run)) if run else 0.0
        means.append(sum(loud[i] + 0.09 * variance[i] * scale for i in run) / len(run) if run else 0.0)
    quota = naive.quotas(means, share, list(map(len, runs)), 0, "weight")
    return [
        i for run, most in zip(runs, quota, strict=True) for i in naive.best_first(run, lambda i: attention[i])[:most]
    ]


@seeds
def test_holov_as_loops(seed):
    rng = Random(seed)
    where, chunks = drawn_layout(rng), rng.choice([1, 3, 16])
    attention = drawn_scores(rng, len(where))
    hidden = torch.tensor([[rng.gauss(0, 1) for _ in range(4)] for _ in range(len(where))], dtype=torch.float64)
    count, cosines = drawn_count(rng, len(where)), naive.cosine(hidden.tolist(), hidden.tolist())
    expected = []
    for number, (tokens, share) in enumerate(shares(where, count)):
        newlines = number == len(where.crops())
        expected += tokens if newlines and share == len(tokens) else []
        expected += [] if newlines else holov(where, tokens, share, attention, cosines, chunks)
    found = kept(select("holov", where, count, {"chunks": chunks}, encoder_attention=attention, hidden=hidden))
    assert len(found) == count
    assert [i for i in found if i not in where.newlines()] == sorted(set(expected) - set(where.newlines()))


# All of them


GIVEN = {
    "fastervlm": ("encoder_attention",), "vispruner": ("encoder_attention", "features"),
    "visionzip": ("encoder_attention", "encoder_keys"), "prumerge": ("encoder_attention", "keys_by_head"),
    "prumerge_plus": ("encoder_attention", "keys_by_head"), "holov": ("encoder_attention", "hidden"),
}  # fmt: skip


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("use", GIVEN)
def test_half_precision_is_ranked_as_the_same_numbers_in_float32(use, half):
    """Features and keys come in the model's dtype, rows of attention in float32."""
    rng = torch.Generator().manual_seed(5)
    where = square(144)
    features = (60 * torch.randn(144, 64, generator=rng)).to(half)
    attention = torch.randn(144, generator=rng).softmax(0)
    answers = []
    for states in (features, features.float()):
        given = {"encoder_attention": attention, "features": (states, states[:0]) if use == "visionzip" else states}
        names = {"features": states, "encoder_keys": states, "keys_by_head": states.view(144, 2, 32), "hidden": states}
        given |= {name.replace("keys_by_head", "encoder_keys"): names[name] for name in GIVEN[use][1:]}
        answers.append(select(use, where, 40, {"cls": False} if use == "visionzip" else None, **given))
    assert kept(answers[0]) == kept(answers[1])
    if answers[0].weights is not None:  # the projector gets sums in the model's dtype
        half_sums, sums = (merged(one, features.float()) for one in answers)
        assert torch.equal(half_sums.to(half), sums.to(half))


@pytest.mark.parametrize("use", GIVEN)
def test_it_runs_behind_another_stage_and_says_what_it_costs(use):
    """`random` thins the tokens before; the cost is less than two percent of LLaVA-1.5-7B's prefill."""
    stages = [{"use": "random", "keep": 0.7}, {"use": use, "keep": 0.3}]
    assert_equivalent(tiny_llava(), {"stages": stages}, tiny_inputs(**BATCHES["ragged"]), steps=2)
    assert 0 < share_of_prefill(use) < 0.02
