"""AIM: rounds of merging and passed-on attention by loops, its counts, both stages together, and what is refused."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from asking import stage_of, unbudgeted
from loops import decided, kept, some
from loops import sizes as drawn_sizes
from plain import SEEDS, best, cosine, sample, spread
from selection_cost import share_of_prefill

import prunekit
from prunekit import ENCODER, Rows, SpecError
from prunekit.engine.attention import decoder_rows
from prunekit.engine.attention.attended import Attended
from prunekit.families import shape_of
from prunekit.testing.tiny import tiny_inputs, tiny_llava
from prunekit.testing.tiny_families import tiny_batch, tiny_model
from prunekit.verify.equivalence import assert_equivalent


def halved(states, wanted):
    """One crop, {token: state}: the groups that are left, {token: (members with their weights, state)}, by loops."""
    line = [(i, {i: 1.0}, state) for i, state in states.items()]
    while len(line) > wanted:
        a, b = line[::2], line[1::2]
        to, strength = [], []
        for _, _, state in a:
            alike = [cosine(state, other) for _, _, other in b]
            to.append(best(range(len(b)), alike.__getitem__, 1)[0])
            strength.append(alike[to[-1]])
        order = best(range(len(a)), strength.__getitem__, len(a))
        gone = order[: min(len(line) - wanted, len(line) // 2)]
        merged = []
        for n, target in enumerate(b):
            group = [target, *(a[i] for i in gone if to[i] == n)]
            weights = {}
            for _, members, _ in group:
                weights |= {i: weight / len(group) for i, weight in members.items()}
            mean = [sum(column) / len(group) for column in zip(*(state for _, _, state in group), strict=True)]
            merged.append((target[0], weights, mean))
        line = [a[i] for i in order if i not in gone] + merged
    return {i: (members, state) for i, members, state in line}


@pytest.mark.parametrize("seed", SEEDS)
def test_it_merges_what_loops_merge(seed):
    """One or two images of one to three crops, newlines among them; every second seed has equal tokens."""
    one = sample(seed)
    hidden = one.vectors(6)
    stage = stage_of("aim", keep=0.5)
    found = decided(stage, one.count, hidden=torch.tensor(hidden, dtype=torch.float64), **one.places)
    owner, amounts = found.weights.owner.tolist(), found.weights.amounts.tolist()
    assert found.weights.mode == "sum"
    wanted = {}
    for tokens, share in spread(one):
        wanted |= halved({i: hidden[i] for i in tokens}, share) if share else {}
    assert found.keep.nonzero()[:, 0].tolist() == sorted(wanted) and len(wanted) == one.count
    for i, (members, _) in wanted.items():
        assert [j for j, other in enumerate(owner) if other == i] == sorted(members)
        assert [amounts[j] for j in sorted(members)] == pytest.approx([members[j] for j in sorted(members)])
    states = torch.tensor(hidden, dtype=torch.float64) * torch.tensor(amounts, dtype=torch.float64)[:, None]
    for i, (_, state) in wanted.items():
        assert states[[j for j, other in enumerate(owner) if other == i]].sum(0).tolist() == pytest.approx(state)


def test_two_rounds_leave_a_quarter_of_a_frame():
    """196 tokens a frame, as LLaVA-OneVision pools a video's: 98, then 49; and by default."""
    shape = dataclasses.replace(shape_of(tiny_llava()), visual_tokens=196)
    (cut,) = prunekit.load({"stages": [{"use": "aim"}]}).bind(shape).cuts
    assert cut.site == ENCODER and cut.keep.count(196, 196) == 49
    coords = torch.tensor([(0, i // 14, i % 14, 14, 14) for i in range(196)])
    owner = decided(stage_of("aim"), 49, hidden=some(0, 196, 4), coords=coords, frames=coords[:, 0]).weights.owner
    groups = torch.bincount(owner, minlength=196)
    assert int(groups.sum()) == 196 and int((groups > 0).sum()) == 49 and int(groups.max()) > 2, "groups merge again"


def page_rank(logits, steps, temperature):
    """Logits (s, s) of one head, -inf where not seen: what each token holds."""
    rows = []
    for line in logits:
        top = max(line)
        parts = [math.exp((one - top) / temperature) if one > -math.inf else 0.0 for one in line]
        rows.append([part / sum(parts) for part in parts])
    held = [1 / len(rows)] * len(rows)
    for _ in range(steps):
        held = [sum(held[i] * rows[i][j] for i in range(len(rows))) for j in range(len(rows))]
    return held


@pytest.mark.parametrize("seed", SEEDS)
def test_it_keeps_what_passed_on_attention_ends_at(seed):
    """From queries and keys to the choice, against loops; every third seed has equal tokens at the end of the image."""
    heads, dim = 2, 3
    visual, count = drawn_sizes(seed)
    front, behind = seed % 3, seed % 4
    length = front + visual + behind
    q, k = (some(seed + more, 1, heads, length, dim) for more in (0, 100))
    stage = stage_of("aim_decoder", at="2.after")
    spec = stage.inputs["attention"]
    assert spec == Rows(layer="own", queries="all", heads="none", temperature=0.1, steps=5)
    slots = torch.arange(length)[None]
    image = torch.arange(front, front + visual)[None]
    there = torch.zeros(1, length, dtype=torch.bool).scatter(1, image, True)
    states = Attended(q, k, k, None, dim**-0.5)
    held = decoder_rows.attention(states, slots, slots >= 0, there, image, spec)[0]
    importance = [0.0] * length
    for head in range(heads):
        logits = [
            [float(q[0, head, i] @ k[0, head, j]) * dim**-0.5 if j <= i else -math.inf for j in range(length)]
            for i in range(length)
        ]
        for j, one in enumerate(page_rank(logits, 5, 0.1)):
            importance[j] += one**2 / heads
    importance = [math.sqrt(one) for one in importance[front : front + visual]]
    found = kept(stage, count, attention=held, sites=(), cut=0)
    assert found == sorted(best(range(visual), importance.__getitem__, count))


@pytest.mark.parametrize("seed", SEEDS[:12])
def test_equal_importance_goes_by_the_index(seed):
    visual, count = drawn_sizes(seed)
    held = some(seed, visual, 3, ties=True)
    importance = [sum(one**2 for one in row) for row in held.tolist()]
    found = kept(stage_of("aim_decoder", at="2.after"), count, attention=held, sites=(), cut=0)
    assert found == sorted(best(range(visual), importance.__getitem__, count))


@pytest.mark.parametrize(
    ("layers", "sites"), [(28, list(range(14, 22))), (32, list(range(16, 25))), (7, [3, 4]), (2, [1])]
)
def test_an_equal_part_leaves_at_each_site(layers, sites):
    """Of the tokens that enter: 7/8, 6/8 ... of them in 28 layers, rounded down, and none behind the last."""
    shape = dataclasses.replace(shape_of(tiny_llava()), layers=layers, visual_tokens=576)
    cuts = prunekit.load({"stages": [{"use": "aim_decoder"}]}).bind(shape).cuts
    assert [str(cut.site) for cut in cuts] == [f"{site}.after" for site in sites]
    stage, state, left = unbudgeted("aim_decoder"), {}, [49]
    for cut in range(len(sites)):
        held = some(cut, left[-1], 2)
        tokens = tuple(one.site for one in cuts)
        left.append(len(kept(stage, None, attention=held, sites=tokens, cut=cut, state=state)))
    assert left[1:] == [int(49 * (1 - (number + 1) / len(sites))) for number in range(len(sites))]
    if layers == 28:
        assert left[1:] == [42, 36, 30, 24, 18, 12, 6, 0]


@pytest.mark.parametrize("positions", ["keep", "renumber"])
def test_both_stages_are_exact_together(positions):
    stages = [{"use": "aim", "keep": 0.5}, {"use": "aim_decoder", "at": ["1.after", "3.after", "4.after"]}]
    pipeline = {"positions": positions, "stages": stages}
    found = assert_equivalent(tiny_llava(), pipeline, tiny_inputs(images=(1, 2)), steps=3)
    assert [list(map(len, event.kept)) for event in found.report.events] == [[8, 16], [5, 10], [2, 5], [0, 0]]


@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl", "gemma3"])
def test_they_are_exact_elsewhere(name):
    """Crops with newlines, several axes of positions, sliding attention."""
    model = tiny_model(name)
    stages = [{"use": "aim", "keep": 0.6}, {"use": "aim_decoder", "at": "1.after", "keep": 0.3}]
    assert_equivalent(model, {"stages": stages}, tiny_batch(model), steps=2)


def test_what_is_refused():
    with pytest.raises(SpecError, match="needs another point of the layer"):
        prunekit.load({"stages": [{"use": "aim_decoder", "at": 2}]}).bind(shape_of(tiny_llava()))


@pytest.mark.parametrize("use", ["aim", "aim_decoder"])
def test_the_selection_is_cheap(use):
    assert 0 < share_of_prefill(use) < 0.02
