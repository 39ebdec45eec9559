"""SCOPE and MMTok, which cover: the authors' own choices, naive twins, and what they refuse."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from asking import ask, cases, stage_of
from golden_files import drawn
from plain import SEEDS, cosine, covering, kept, sample, softmax, spread

import prunekit
from prunekit.families import shape_of
from prunekit.testing.tiny import tiny_llava
from prunekit.testing.tiny_families import tiny_model

both = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def one_crop(side: int, rows: int) -> dict[str, torch.Tensor]:
    coords = [(0, i // side, i % side, rows, side) for i in range(side * rows)]
    return {"coords": torch.tensor(coords), "frames": torch.zeros(len(coords), dtype=torch.int64)}


@both
@pytest.mark.parametrize("case", cases("scope", 4))
def test_scope_as_its_authors(case, dtype):
    t, p = drawn(case, dtype), case["params"]
    stage = stage_of("scope", alpha=p["alpha"])
    assert stage.inputs["encoder_attention"].heads == "sum"
    saliency, side = t["cls_row"].sum(0)[1:], 24 if p["patches"] == 576 else 12
    keep = ask(
        stage, "select_tokens", encoder_attention=saliency, features=t["features"], count=p["keep"],
        **one_crop(side, side),
    )  # fmt: skip
    assert kept(keep) == case["expected"]["kept_sorted"]


@both
@pytest.mark.parametrize("case", cases("mmtok", 4))
def test_mmtok_as_its_authors(case, dtype):
    """One of their cases leaves padding patches out, which prunekit does not; the others cover the rule."""
    t, p = drawn(case, dtype), case["params"]
    stage = stage_of(
        "mmtok", alpha=p["alpha"], word_temperature=p["tv_temp"], token_temperature=p["vv_temp"]
    )  # fmt: skip
    after = torch.ones(p["text_tokens"], dtype=torch.bool)
    tokens = {"hidden": t["tokens"], "features": t["vit_features"], "text": t["text"], "text_after": after}
    keep = kept(ask(stage, "select_tokens", count=p["keep"], **tokens))
    assert len(keep) == p["keep"]
    assert (keep == case["expected"]["kept_sorted"]) == ("excluded" not in p)


@pytest.mark.parametrize("seed", SEEDS)
def test_scope_as_loops(seed):
    one = sample(seed)
    attention, features = one.numbers(), one.vectors()
    # Two tokens of equal saliency gain the same as the first, of which rounding makes something else.
    alpha = one.draw.choice([0.0, 1.0, 2.0] if one.tied else [1.0, 2.0])
    expected = []
    for crop, wanted in spread(one):
        rows = [[cosine(features[i], features[j]) for j in range(len(one))] for i in crop]
        expected += covering(crop, wanted, rows, [a**alpha for a in attention])
    keep = ask(
        stage_of("scope", alpha=alpha), "select_tokens", count=one.count,
        encoder_attention=torch.tensor(attention).double(), features=torch.tensor(features).double(), **one.places,
    )  # fmt: skip
    assert kept(keep) == sorted(expected) and len(expected) == one.count


@pytest.mark.parametrize("seed", SEEDS)
def test_mmtok_as_loops(seed):
    one = sample(seed, images=1)
    tokens, features, alpha = one.vectors(), one.vectors(), one.draw.choice([0.0, 0.5])
    if one.tied:
        # All are equal, in numbers whose parts are exact: other ties are told apart by how sums are rounded.
        many = 1 << len(one).bit_length() - 1
        tokens, features = tokens[:1] * many, features[:1] * many
    text = (one.vectors() * 5)[: one.draw.choice([1, 2, 4])]
    after = [seed % 3 == 2 or (seed % 3 == 1 and i % 2 == 0) for i in range(len(text))]
    words = [word for word, behind in zip(text, after, strict=True) if behind] or text
    rows = [[p / len(words) for p in softmax([cosine(word, x) / 0.02 for x in tokens])] for word in words]
    rows += [[alpha * p / len(features) for p in softmax([cosine(x, y) / 0.2 for y in features])] for x in features]
    expected = covering(range(len(tokens)), one.count, rows, [1.0] * len(tokens))
    keep = ask(
        stage_of("mmtok", alpha=alpha), "select_tokens", count=one.count, text_after=torch.tensor(after),
        **{name: torch.tensor(x).double() for name, x in (("hidden", tokens), ("features", features), ("text", text))},
    )  # fmt: skip
    assert kept(keep) == sorted(expected)


def test_half_precision_is_computed_in_float32():
    """Features whose norm overflows float16 keep their directions, and so the choice."""
    one = sample(5, thinned=False)
    features = torch.tensor(one.vectors()).clamp(-1.6, 1.6).half() + 1.6
    attention = torch.tensor(one.numbers()).half()
    given = {"count": one.count, **one.places}
    stage = stage_of("scope")
    wide = ask(stage, "select_tokens", encoder_attention=attention.float(), features=features.float() * 2e4, **given)
    half = ask(stage, "select_tokens", encoder_attention=attention, features=features * 2e4, **given)
    assert (features * 2e4).float().norm(dim=-1).max() > 65504 > (features * 2e4).float().abs().max()
    assert torch.equal(wide, half)


@pytest.mark.parametrize("use", ["scope", "mmtok"])
def test_a_tower_that_cannot_be_read_is_refused(use):
    shape = dataclasses.replace(shape_of(tiny_llava()), tower=None)
    with pytest.raises(prunekit.SpecError, match="this model's vision tower cannot be read"):
        prunekit.load({"stages": [{"use": use, "keep": 0.5}]}).bind(shape)


def test_refusals():
    with pytest.raises(prunekit.SpecError, match="this vision tower has no CLS token"):
        prunekit.load({"stages": [{"use": "scope", "keep": 0.5}]}).bind(shape_of(tiny_model("llava_onevision")))
    with pytest.raises(prunekit.SpecError, match=r"alpha: is -1.0; it is a power from 0"):
        stage_of("scope", alpha=-1.0)
    with pytest.raises(prunekit.SpecError, match=r"word_temperature: is 0.0; it is above 0"):
        stage_of("mmtok", word_temperature=0.0)
    with pytest.raises(prunekit.SpecError, match="cannot act at '2': it needs 'encoder'"):
        stage_of("mmtok", at=2)
