"""LRCP and the first stage of ToDRE, of which no authors' code is known: facts, naive twins, refusals."""

from __future__ import annotations

import pytest
import torch
from asking import ask, stage_of
from plain import SEEDS, best, cosine, greedy, kept, sample

import prunekit
from prunekit.families import shape_of
from prunekit.testing.tiny_families import tiny_batch, tiny_model
from prunekit.verify.equivalence import assert_equivalent


def principal(rows: list[list[float]], rank: int) -> list[list[float]]:
    """The leading directions by power iteration on what is left of the covariance, one after the other."""
    width = range(len(rows[0]))
    left, found = [list(row) for row in rows], []
    for _ in range(rank):
        energy = [[sum(row[i] * row[j] for row in left) for j in width] for i in width]
        direction = max(energy, key=lambda row: sum(a * a for a in row))
        if sum(a * a for a in direction) < 1e-18:
            break
        for _ in range(3000):
            length = sum(a * a for a in direction) ** 0.5
            unit = [a / length for a in direction]
            direction = [sum(a * b for a, b in zip(row, unit, strict=True)) for row in energy]
        found.append(unit)
        for row in left:
            along = sum(a * b for a, b in zip(row, unit, strict=True))
            row[:] = [a - along * b for a, b in zip(row, unit, strict=True)]
    return found


@pytest.mark.parametrize("seed", SEEDS)
def test_lrcp_as_loops(seed):
    """Tied samples have tokens of four kinds, whose residual is 0 from rank 3 on: the first tokens stay."""
    one = sample(seed, images=1)
    rank = one.draw.choice([1, 2]) if not one.tied else 4
    tokens = one.vectors(4)
    if one.tied:
        tokens = [[float(i % 4 == k) for k in range(4)] for i in range(len(one))]
    mean = [sum(column) / len(one) for column in zip(*tokens, strict=True)]
    centred = [[a - b for a, b in zip(row, mean, strict=True)] for row in tokens]
    residual = [sum(a * a for a in row) for row in centred]
    for direction in principal(centred, rank):
        along = [sum(a * b for a, b in zip(row, direction, strict=True)) ** 2 for row in centred]
        residual = [a - b for a, b in zip(residual, along, strict=True)]
    score = [one if one > 1e-12 else 0.0 for one in residual]
    stay = best(range(len(one)), score.__getitem__, one.count)
    owner = [i if i in stay else best(stay, lambda j, i=i: cosine(tokens[i], tokens[j]), 1)[0] for i in range(len(one))]
    found = ask(stage_of("lrcp", rank=rank), "select_tokens", hidden=torch.tensor(tokens).double(), count=one.count)
    assert kept(found.keep) == sorted(stay)
    assert (found.weights.owner.tolist(), found.weights.mode) == (owner, "mean")


def test_lrcp_keeps_what_its_directions_leave_out():
    """Of a bulk in a plane and one token orthogonal to it, that one stays: directions are spent on the bulk."""
    draws = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    tokens = torch.nn.functional.pad(draws, (0, 6))
    tokens[23, 5] = 1.5
    for count in (1, 5, 20):
        found = ask(stage_of("lrcp", rank=2), "select_tokens", hidden=tokens, count=count)
        assert found.keep[23] and int(found.keep.sum()) == count
    flat = ask(stage_of("lrcp", rank=2), "select_tokens", hidden=torch.nn.functional.pad(draws, (0, 6)), count=7)
    assert kept(flat.keep) == list(range(7))  # nothing is left of any, so that the lower index decides
    assert [prunekit.Keep(share).count(576, 576) for share in (0.333, 0.222, 0.111)] == [192, 128, 64]


def test_lrcp_in_half_precision_chooses_as_in_float32():
    tokens = torch.randn(64, 96, generator=torch.Generator().manual_seed(1)).half() * 2e4
    tokens = tokens.clamp(-6e4, 6e4)
    stage = stage_of("lrcp")
    half, wide = (ask(stage, "select_tokens", hidden=x, count=20) for x in (tokens, tokens.float()))
    assert torch.equal(half.keep, wide.keep) and torch.equal(half.weights.owner, wide.weights.owner)


@pytest.mark.parametrize("seed", SEEDS)
def test_todre_as_loops(seed):
    one = sample(seed)
    attention, tokens = one.numbers(), one.vectors()
    whole = [i for i in range(len(one)) if one.frames[i] == 0] or list(range(len(one)))
    pivot = best(whole, attention.__getitem__, 1)[0]

    def gain(token, chosen):
        if not chosen:
            return float(token == pivot)
        return -sum(cosine(tokens[token], tokens[j]) for j in chosen)

    expected = greedy(range(len(one)), one.count, gain)
    keep = ask(
        stage_of("todre"), "select_tokens", encoder_attention=torch.tensor(attention).double(),
        hidden=torch.tensor(tokens).double(), frames=one.places["frames"], count=one.count,
    )  # fmt: skip
    assert kept(keep) == sorted(expected)


def test_todre_keeps_the_pivot_alone_and_takes_turns_between_clusters():
    side = torch.tensor([1.0, 1, 1, 1, -1, -1, -1, -1])
    hidden, attention = torch.stack([side, torch.zeros(8)], 1), torch.tensor([0.1, 0.1, 0.3, 0.1, 0.1, 0.1, 0.1, 0.1])
    given = {"encoder_attention": attention, "hidden": hidden, "frames": torch.zeros(8, dtype=torch.int64)}
    for count, chosen in ((1, [2]), (2, [2, 4]), (4, [0, 2, 4, 5])):
        assert kept(ask(stage_of("todre"), "select_tokens", count=count, **given)) == chosen
    assert prunekit.Keep(0.1).count(2880, 2880) == 288


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl"])
def test_towers_without_cls_take_another_pivot(family):
    model = tiny_model(family)
    refused = prunekit.load({"stages": [{"use": "todre", "keep": 0.5}]})
    with pytest.raises(prunekit.SpecError, match="this vision tower has no CLS token"):
        refused.bind(shape_of(model))
    stages = [{"use": "todre", "keep": 0.5, "pivot": "mean"}, {"use": "lrcp", "keep": 0.25, "at": 2}]
    assert_equivalent(model, {"stages": stages}, tiny_batch(model), steps=2)


def test_refusals():
    with pytest.raises(prunekit.SpecError, match="rank: is 0; it is a number of directions from 1"):
        stage_of("lrcp", rank=0)
