"""iLLaVA: the fused token by loops, in crops and in the decoder, its counts, both stages together, and refusals."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from asking import stage_of
from loops import decided, some
from loops import sizes as drawn_sizes
from plain import SEEDS, best, sample, spread
from selection_cost import share_of_prefill

import prunekit
from prunekit import SpecError
from prunekit.families import shape_of
from prunekit.testing.tiny import tiny_inputs, tiny_llava
from prunekit.testing.tiny_configs import CONFIGS
from prunekit.testing.tiny_families import tiny_batch, tiny_from_config
from prunekit.verify.equivalence import assert_equivalent


def fused(received, tokens, count, ramp):
    """{kept token: {member: weight}} of one crop, by loops; nothing is fused where nothing leaves."""
    order = best(tokens, lambda i: received[i], len(tokens))
    wanted = {i: {i: 1.0} for i in order[:count]}
    if count in (0, len(tokens)):
        return wanted
    together = order[count - 1 :]  # the most attended of them first
    ramped = range(1, len(together) + 1) if ramp == "official" else range(len(together), 0, -1)
    wanted[together[0]] = {i: weight / sum(ramped) for i, weight in zip(together, ramped, strict=True)}
    return wanted


def check(found, wanted):
    owner, amounts = found.weights.owner.tolist(), found.weights.amounts.tolist()
    assert found.weights.mode == "sum" and found.keep.nonzero()[:, 0].tolist() == sorted(wanted)
    for i, members in wanted.items():
        assert [j for j, other in enumerate(owner) if other == i] == sorted(members)
        assert [amounts[j] for j in sorted(members)] == pytest.approx([members[j] for j in sorted(members)])


@pytest.mark.parametrize("ramp", ["official", "reversed"])
@pytest.mark.parametrize("seed", SEEDS)
def test_it_fuses_in_the_tower_what_loops_fuse(seed, ramp):
    """An image of one to three crops; every second seed has equal tokens."""
    one = sample(seed, newlines=False, images=1)
    received = one.numbers()
    given = torch.tensor(received, dtype=torch.float64)
    stage = stage_of("illava", ramp=ramp)
    found = decided(stage, one.count, encoder_attention=given, hidden=given[:, None], **one.places)
    wanted = {}
    for tokens, share in spread(one):
        wanted |= fused(received, tokens, share, ramp)
    check(found, wanted)


@pytest.mark.parametrize("ramp", ["official", "reversed"])
@pytest.mark.parametrize("seed", SEEDS)
def test_it_fuses_in_the_decoder_what_loops_fuse(seed, ramp):
    visual, count = drawn_sizes(seed)
    attention = some(seed, visual, ties=seed % 2 == 0).abs()
    found = decided(stage_of("illava_decoder", ramp=ramp), count, attention=attention)
    check(found, fused(attention.tolist(), range(visual), count, ramp))


def test_the_least_attended_weighs_most():
    """Of three that become one, in the place of the best of them: 1/6, 2/6 and 3/6."""
    attention = torch.tensor([0.4, 0.1, 0.3, 0.2])
    found = decided(stage_of("illava_decoder"), 2, attention=attention)
    assert found.weights.owner.tolist() == [0, 2, 2, 2]
    assert found.weights.amounts.tolist() == pytest.approx([1, 3 / 6, 1 / 6, 2 / 6])
    whole = decided(stage_of("illava_decoder"), 4, attention=attention)
    assert whole.weights.amounts.tolist() == [1, 1, 1, 1]


def test_92_tokens_leave_in_each_of_four_blocks():
    """Of 729, in the 26 blocks that make LLaVA-OneVision's features; then 0.7 of what is left, before layer 8 of 28."""
    tower = dataclasses.replace(shape_of(tiny_llava()).tower, blocks=27, feature_block=25)
    shape = dataclasses.replace(shape_of(tiny_llava()), layers=28, visual_tokens=729, tower=tower)
    cuts = prunekit.load("illava").bind(shape).cuts
    assert [str(cut.site) for cut in cuts] == [*(f"vision.{block}.mid" for block in (5, 6, 7, 8)), "8"]
    left = [729]
    for cut in cuts:
        left.append(cut.keep.count(729, left[-1]))
    assert left == [729, 637, 545, 453, 361, 253]


def test_a_budget_is_spread_over_the_blocks():
    placements = stage_of("illava", keep_tokens=361).placements(28, 26)
    left = [729]
    for _, keep in placements:
        left.append(keep.count(729, left[-1]))
    assert left == [729, 637, 545, 453, 361]


def deep(depth: int, family: str):
    config = CONFIGS[family](3)
    config.vision_config.num_hidden_layers = depth
    return tiny_from_config(config)


@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision"])
def test_both_stages_are_exact_together(family):
    """Also crop by crop, and without a class token."""
    model = deep(12, family)
    stages = [{"use": "illava"}, {"use": "illava_decoder", "keep": 0.7, "keep_of": "current"}]
    found = assert_equivalent(model, {"stages": stages}, tiny_batch(model), steps=2)
    sites = [event.site for event in found.report.events]
    assert sites == ["vision.2.mid", "vision.3.mid", "1"], "two of the four blocks fall together"


def test_it_is_exact_behind_another():
    stages = [{"use": "random", "keep": 0.75}, {"use": "illava_decoder", "at": 2, "keep": 0.25, "ramp": "reversed"}]
    found = assert_equivalent(tiny_llava(), {"stages": stages}, tiny_inputs(images=(1, 2)), steps=3)
    assert [list(map(len, event.kept)) for event in found.report.events] == [[12, 24], [4, 8]]


def test_refusals():
    shape = dataclasses.replace(shape_of(tiny_llava()), tower=None)
    with pytest.raises(SpecError, match="this model's vision tower cannot be cut"):
        prunekit.load({"stages": [{"use": "illava"}]}).bind(shape)
    with pytest.raises(SpecError, match="cannot act at 'encoder': it needs a tower site"):
        stage_of("illava", at="encoder")
    with pytest.raises(SpecError, match="needs layer 1 or later"):
        stage_of("illava_decoder", at=0)


@pytest.mark.parametrize("use", ["illava", "illava_decoder"])
def test_the_selection_is_cheap(use):
    assert 0 < share_of_prefill(use) < 0.02
