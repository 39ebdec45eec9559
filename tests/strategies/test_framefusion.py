"""FrameFusion: a naive twin through all its sites, figures, and videos of several families."""

from __future__ import annotations

import pytest
import torch
from asking import ask
from clips import SEEDS, clip_sample, grid_of, model_of, on_videos
from plain import best, cosine, kept
from prunekit_evals.bench import llava_7b
from selection_cost import share_of_prefill

import prunekit
from prunekit.families import shape_of
from prunekit.testing.tiny_families import tiny_batch
from prunekit.verify.equivalence import assert_equivalent

LOOSE = {"similarity": 0.0, "cost": 0.6}
globals().update(on_videos("framefusion", LOOSE, keep=None))


def stage(**options):
    return prunekit.load({"stages": [{"use": "framefusion", **options}]}).stages[0]


def spare_of(merged, cost):
    left, seen, layers = 1.0, 0.0, llava_7b.shape().layers
    for part in merged:
        left *= 1 - part
        seen += left
    return max(1 - (layers * cost - seen) / ((layers - len(merged)) * left), 0.0)


def loops(one, there, tokens, attention, merged, phase, o):
    """Who joins whom among the tokens that are there, and the next phase; for sites one after the other."""
    owner = {i: i for i in there}
    if phase == "done":
        return owner, phase
    spare = spare_of(merged, o["cost"])
    if phase == "prune":
        stay = best(there, attention.__getitem__, max(round(len(there) * (1 - spare)), 1))
        return {i: i if i in stay else -1 for i in there}, "done"
    before, alike = {}, {}
    for i in there:
        earlier = [j for j in there if one.coords[j] == one.coords[i] and one.frames[j] < one.frames[i]]
        if one.videos[i] and one.coords[i][1] >= 0 and earlier:
            before[i] = max(earlier, key=lambda j: one.frames[j])
            alike[i] = cosine(tokens[i], tokens[before[i]])
    joins = [i for i in alike if alike[i] >= o["similarity"]]
    part = len(joins) / len(there)
    if part < spare:
        merged.append(part)
        phase = "prune" if part < o["least"] else "merge"
    else:
        joins, phase = best(joins, alike.__getitem__, int(spare * len(there))), "done"
    for i in there:
        while owner[i] in joins:
            owner[i] = before[owner[i]]
    return owner, phase


@pytest.mark.parametrize("seed", SEEDS)
def test_as_loops(seed):
    """Six sites, at each of which states are new: near to what stands at the place before, and often equal."""
    one = clip_sample(seed)
    options = {
        "cost": one.draw.choice((0.2, 0.5, 1.0)), "similarity": one.draw.choice((0.3, 0.6, 0.95)),
        "least": one.draw.choice((0.1, 0.4)),
    }  # fmt: skip
    there, merged, phase, state, decided = list(range(len(one))), [], "merge", {}, stage(**options)
    places = one.places
    for site in range(6):
        tokens, attention = one.vectors(4), one.numbers()
        owner, phase = loops(one, there, tokens, attention, merged, phase, options)
        index = torch.tensor(there)
        found = ask(
            decided, "select_tokens", hidden=torch.tensor(tokens, dtype=torch.float64)[index], shape=llava_7b.shape(),
            attention=torch.tensor(attention, dtype=torch.float64)[index] if site else None, state=state,
            **{name: table[index] for name, table in places.items()},
        )  # fmt: skip
        if isinstance(found, torch.Tensor):
            assert [there[i] for i in kept(found)] == [i for i in there if owner[i] == i]
        else:
            assert [there[i] for i in found.weights.owner.tolist()] == [owner[i] for i in there]
            assert found.weights.mode == "mean"
        there = [i for i in there if owner[i] == i]
        assert state.get("phase", "merge") == phase


def asked(hidden, given, state, attention=None, **options):
    return ask(
        stage(**options),
        "select_tokens",
        hidden=hidden,
        attention=attention,
        state=state,
        shape=llava_7b.shape(),
        **given,
    )


def test_a_video_that_never_changes():
    """Of 16 equal frames 0.7 of the tokens merge at once, the others are what all layers see."""
    given, state = grid_of(16, 5, 5), {}
    hidden = torch.randn(1, 25, 8, generator=torch.Generator().manual_seed(0)).expand(16, 25, 8).flatten(0, 1)
    found = asked(hidden, given, state)
    assert int(found.keep.sum()) == 400 - int(0.7 * 400) and state["phase"] == "done"
    assert asked(hidden, given, state).all()
    whole = asked(hidden, given, {}, cost=1 / 16)
    assert kept(whole.keep) == list(range(25))
    assert whole.weights.owner.tolist() == list(range(25)) * 16


def test_what_nothing_merges_in_is_pruned_inside_the_first_layer():
    """Of an image; one layer of 32 has seen all of it: 0.3 of all tokens is what 31 layers then see less one."""
    given, state = grid_of(1, 24, 24) | {"videos": torch.zeros(576, dtype=torch.bool)}, {}
    hidden = torch.randn(576, 8, generator=torch.Generator().manual_seed(1))
    assert asked(hidden, given, state).keep.all()
    attention = torch.rand(576, generator=torch.Generator().manual_seed(2))
    keep = asked(hidden, given, state, attention)
    count = round(576 * (32 * 0.3 - 1) / 31)
    assert kept(keep) == sorted(best(range(576), attention.tolist().__getitem__, count))
    assert asked(hidden, given, state, attention).all()


def test_one_token_is_left_where_the_budget_is_spent():
    given, state = grid_of(1, 4, 4), {}
    hidden = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
    asked(hidden, given, state, cost=0.01)
    assert int(asked(hidden, given, state, torch.rand(16), cost=0.01).sum()) == 1


def test_half_precision_chooses_as_float32():
    given = grid_of(4, 4, 4)
    hidden = (torch.randn(64, 16, generator=torch.Generator().manual_seed(5)) * 3e4).clamp(-6e4, 6e4).half()
    half, wide = (asked(x, given, {}, similarity=0.1) for x in (hidden, hidden.float()))
    assert torch.equal(half.weights.owner, wide.weights.owner) and not half.keep.all()


def test_its_sites_are_in_front_of_the_decoder_and_inside_every_layer():
    bound = prunekit.load({"stages": [{"use": "framefusion"}]}).bind(shape_of(model_of("llava_onevision")))
    assert [str(cut.site) for cut in bound.cuts] == ["encoder", *(f"{layer}.mid" for layer in range(6))]


def test_it_is_exact_where_it_merges_twice_and_prunes():
    model = model_of("qwen2_5_vl")
    pipeline = {"stages": [{"use": "framefusion", "similarity": 0.05, "cost": 0.5, "least": 0.2}]}
    found = assert_equivalent(model, pipeline, tiny_batch(model, (("video", "video"), ("image", "video"))), steps=2)
    left = [sum(map(len, event.kept)) for event in found.report.events]
    assert left[0] < sum(found.report.visual_tokens) and left[-1] < left[0]


def test_what_it_costs_and_refuses():
    assert 0 < share_of_prefill("framefusion") < 0.02
    with pytest.raises(prunekit.SpecError, match=r"cost: is 0\.0; it is a part, above 0 and up to 1"):
        stage(cost=0.0)
    with pytest.raises(prunekit.SpecError, match=r"another point of the layer: '2\.mid'"):
        stage(at=2)
