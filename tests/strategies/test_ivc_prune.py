"""IVC-Prune: both rules by loops, the coordinates of LLaVA-1.5, its counts, what it crops, and refusals."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from asking import stage_of, unbudgeted
from loops import SEEDS, best, decided, sizes, some
from selection_cost import share_of_prefill

import prunekit
from prunekit import SpecError
from prunekit.families import shape_of
from prunekit.testing.tiny import tiny_inputs, tiny_llava
from prunekit.testing.tiny_families import tiny_batch, tiny_model
from prunekit.verify.equivalence import assert_equivalent


def rotations(positions, dim=128, base=10000.0):
    """float (V, 1, 2 * dim): cosines, then sines, of rotary positions."""
    angle = positions.double()[:, None] * base ** (-torch.arange(0, dim, 2).double() / dim)
    return torch.cat([angle.cos()] * 2 + [angle.sin()] * 2, dim=-1)[:, None]


def alike(row, keys):
    """Mean over heads of softmax of one token's values (a, d) with others', by loops."""
    total = [0.0] * len(keys)
    for head in range(len(row)):
        logits = [
            sum(a * b for a, b in zip(row[head], key[head], strict=True)) / math.sqrt(len(row[head])) for key in keys
        ]
        parts = [math.exp(one - max(logits)) for one in logits]
        total = [had + part / sum(parts) / len(row) for had, part in zip(total, parts, strict=True)]
    return total


def twin(visual, text, after, turns, count, seeds=0.01, foreground=0.2, coordinates=None, skip=2):
    """Indices kept, ascending. turns: the mean cosine and sine at each token's position."""
    number = len(visual)
    keys = visual if count is not None else visual + text
    behind = [one for one, is_after in zip(text, after, strict=True) if is_after]
    asking = behind[skip:] or behind or [*visual, *text]
    rows = [alike(one, keys)[:number] for one in asking]
    chosen = best([sum(column) / len(rows) for column in zip(*rows, strict=True)], max(round(seeds * number), 1))
    rows += [alike(visual[i], keys)[:number] for i in sorted(chosen)]
    score = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    share = round((coordinates if coordinates is not None else 0.05 if count is None else 0.1) * number)
    first = {*chosen, *best(turns[0], share), *best(turns[1], share)}
    if count is None:
        return sorted(first | set(best(score, round(foreground * number))))
    return sorted(sorted(range(number), key=lambda i: (i not in first, -score[i], i))[:count])


@pytest.mark.parametrize("budgeted", [False, True], ids=["union", "count"])
@pytest.mark.parametrize("seed", SEEDS)
def test_it_keeps_what_a_loop_keeps(seed, budgeted):
    """Every third seed has equal tokens; prompts with much, little and no text behind the image."""
    visual, count = sizes(seed)
    words, heads, ties = seed % 6, 2, seed % 3 == 0
    values, text = some(seed, visual, heads, 3, ties=ties), some(seed + 50, words, heads, 3, ties=ties)
    if ties:
        values = values[torch.arange(visual) // 2]
    after = torch.arange(words) >= seed % 2
    options = {"seeds": (0.01, 0.2)[seed % 2], "foreground": (0.2, 0.4)[seed // 2 % 2], "skip": (2, 0)[seed // 3 % 2]}
    options |= {"coordinates": (None, 0.3)[seed // 4 % 2]}
    rotary = rotations(torch.arange(visual) + seed, 6)
    turns = [part.mean((1, 2)).tolist() for part in rotary.chunk(2, dim=-1)]
    stage = stage_of("ivc_prune", **options) if budgeted else unbudgeted("ivc_prune", **options)
    count = count if budgeted else None
    found = decided(
        stage, count, values=values, text_values=text, text_after=after, rotary=rotary, hidden=values[:, 0]
    )
    wanted = twin(values.tolist(), text.tolist(), after.tolist(), turns, count, **options)
    assert found.keep.nonzero()[:, 0].tolist() == wanted and found.crop
    assert not budgeted or len(wanted) == count


def indices(*parts):
    return [i for part in parts for i in (range(part[0], part[1] + 1) if isinstance(part, tuple) else (part,))]


def test_the_coordinates_of_llava_are_constant():
    """An image of 576 tokens that starts at 35: 29 of each kind, disjoint; and at any precision above half."""
    stage = unbudgeted("ivc_prune").strategy
    places = torch.arange(35, 35 + 576)
    cosines = indices((0, 10), (13, 17), (21, 24), (30, 33), (40, 42), 53, 66)
    sines = indices(
        149, 192, 211, 212, 249, 250, 293, 294, (343, 345), 368, (401, 404), (430, 432), (469, 471), 502, 503,
        (546, 550),
    )  # fmt: skip
    assert len(cosines) == len(sines) == 29 and not set(cosines) & set(sines)
    for dtype in (torch.float32, torch.float64):
        found = stage._coordinates(rotations(places).to(dtype), budgeted=False)
        assert found.nonzero()[:, 0].tolist() == sorted(cosines + sines)


def test_numbers_of_the_authors_settings():
    """6 seeds, 115 of the foreground, 2 x 29 coordinates of 576: 115 to 179 stay; of 1000 with a half exactly 500."""
    for seed in range(3):
        values, text = some(seed, 576, 2, 4), some(seed + 9, 20, 2, 4)
        given = {"text_values": text, "text_after": torch.arange(20) > 3, "rotary": rotations(torch.arange(576) + 35)}
        found = decided(unbudgeted("ivc_prune"), None, values=values, hidden=values[:, 0], **given)
        assert 115 <= int(found.keep.sum()) <= 179
    values = some(3, 1000, 2, 4)
    given["rotary"] = rotations(torch.arange(1000) + 15)
    found = decided(stage_of("ivc_prune"), 500, values=values, hidden=values[:, 0], **given)
    first = stage_of("ivc_prune").strategy._coordinates(given["rotary"], budgeted=True)
    assert int(found.keep.sum()) == 500 and bool(found.keep[first].all()) and 100 <= int(first.sum()) <= 200


def test_values_beyond_half_precision_are_ranked():
    """Products of 300 with 300 are infinite in fp16 when a head sums up more than seven of them."""
    values = torch.ones(4, 1, 64, dtype=torch.float16)
    values[2] = 300
    text = torch.full((3, 1, 64), 300.0, dtype=torch.float16)
    rotary = torch.zeros(4, 1, 4)
    found = decided(
        unbudgeted("ivc_prune", coordinates=0.0, foreground=0.25), None, values=values, text_values=text,
        text_after=torch.ones(3, dtype=torch.bool), rotary=rotary, hidden=values[:, 0],
    )  # fmt: skip
    assert found.keep.tolist() == [False, False, True, False]


def test_the_default_site_is_the_middle():
    for layers, site in ((32, "16"), (28, "14"), (1, "1")):
        stage = unbudgeted("ivc_prune")
        assert str(stage.sites.resolve(layers)) == site


@pytest.mark.parametrize("keep", [{}, {"keep": 0.25}], ids=["union", "count"])
@pytest.mark.parametrize("positions", ["keep", "renumber"])
def test_it_is_exact_behind_another_and_crops(positions, keep):
    stages = [{"use": "random", "keep": 0.75}, {"use": "ivc_prune", **keep}]
    inputs = tiny_inputs(images=(1, 2), text=(9, 14))
    found = assert_equivalent(tiny_llava(), {"positions": positions, "stages": stages}, inputs, steps=3)
    report = found.report
    assert report.events[-1].crop and set(report.kv_tokens[0]) == {report.layer_tokens[0][-1]}
    if keep:
        assert [len(one) for one in report.events[-1].kept] == [4, 8]


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava_next", "gemma3"])
def test_it_is_exact_elsewhere(name):
    """Several axes of positions, keys shared by heads, rotations of several kinds."""
    model = tiny_model(name)
    for keep in ({}, {"keep": 0.4}):
        assert_equivalent(model, {"stages": [{"use": "ivc_prune", "at": 1, **keep}]}, tiny_batch(model), steps=2)


def test_what_is_refused():
    shape = shape_of(tiny_llava())
    with pytest.raises(SpecError, match="'ivc_prune' asks for rotary, but the llava decoder rotates nothing"):
        prunekit.load({"stages": [{"use": "ivc_prune"}]}).bind(dataclasses.replace(shape, rotary=False))
    with pytest.raises(SpecError, match="needs layer 1 or later"):
        unbudgeted("ivc_prune", at=0)
    for name in ("seeds", "foreground", "coordinates"):
        with pytest.raises(SpecError, match=f"{name}: is a fraction, from 0 to 1"):
            unbudgeted("ivc_prune", **{name: 1.5})
    with pytest.raises(SpecError, match="skip: is at least 0"):
        unbudgeted("ivc_prune", skip=-1)


def test_the_selection_is_cheap():
    assert 0 < share_of_prefill("ivc_prune") < 0.02
