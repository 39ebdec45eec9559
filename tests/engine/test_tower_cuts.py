"""Cuts inside the vision tower equal a naive forward that masks, merges and weighs by the same decisions."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from tower_cases import (
    ClsTopK,
    Merging,
    Norms,
    Skewed,
    Steps,
    naive_logits,
    naive_states,
    piped,
    tome,
    tower_of,
)

import prunekit
from prunekit.testing.tiny import row_of, tiny_inputs, tiny_llava
from prunekit.verify.precision import Float64Throughout

BATCHES = {"one": ((1,), 9), "two": ((1, 2), (12, 9)), "mixed": ((2, 0, 1), (9, 7, 12))}
CUTS = {
    "after": [(Norms, {"at": "vision.0", "keep": 0.5})],
    "mid": [(Norms, {"at": "vision.1.mid", "keep": 0.3})],
    "late": [(Norms, {"at": "vision.1", "keep_tokens": 5})],
    "rows": [(ClsTopK, {"at": "vision.0", "keep": 0.4})],
    "several": [
        (Norms, {"at": "vision.0.mid", "keep": 0.8}),
        (ClsTopK, {"at": "vision.0", "keep": 0.6}),
        (Norms, {"at": "vision.1.mid", "keep": 0.4}),
        (ClsTopK, {"at": "vision.1", "keep": 0.2}),
    ],
    "stage": [(Steps, {"at": ["vision.0", "vision.1"], "keep": [0.5, 0.25]})],
}
model_of = cache(tiny_llava)


@pytest.fixture(autouse=True)
def _exact():
    with Float64Throughout(), torch.no_grad():
        yield


def replay(report, pictures, patches=16):
    """The events in the tower as cuts of the naive forward; the pictures stand row by row in their order."""
    cuts = []
    for event in report.events:
        site = prunekit.Site.parse(event.site)
        if site.place == "vision":
            keep, first = torch.zeros(pictures, patches, dtype=torch.bool), 0
            for kept, count in zip(event.kept, report.visual_tokens, strict=True):
                keep[first : first + count // patches].view(-1)[list(kept)] = True
                first += count // patches
            cuts.append((site.layer, site.point, lambda *_, keep=keep: (keep, None, None)))
    return cuts


def reference(model, inputs, cuts, steps=0):
    """Logits and greedy text of the naive forward, and what is left of each picture."""
    states, _, _, left = naive_states(model, inputs["pixel_values"], cuts)
    chosen = states[model.config.vision_feature_layer % len(states)][:, tower_of(model)[1] :]
    features = model.model.multi_modal_projector(chosen)
    return *naive_logits(model, inputs, features, left, steps), left


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", CUTS)
def test_a_cut_equals_masking_from_there_on(name, batch, attention):
    model, inputs = model_of(attention), tiny_inputs(*BATCHES[batch])
    with prunekit.apply(model, piped(*CUTS[name])) as run:
        logits = model(**inputs).logits[:, -1]
    expected, _, left = reference(model, inputs, replay(run.report, len(inputs["pixel_values"])))
    assert (logits - expected).abs().max() < 1e-9
    kept = [int(rows.sum()) for rows in left.split(list(BATCHES[batch][0]))]
    assert run.report.kept_tokens == tuple(kept)
    plain = [prompt - visual for prompt, visual in zip(run.report.prompt_tokens, run.report.visual_tokens, strict=True)]
    assert [layers[0] for layers in run.report.layer_tokens] == [p + k for p, k in zip(plain, kept, strict=True)]


def test_the_report_counts_tokens_of_the_tower():
    model, inputs = model_of("sdpa"), tiny_inputs((1, 2), (12, 9))
    with prunekit.apply(model, piped(*CUTS["several"])) as run:
        model(**inputs)
    kept = [[len(row) for row in event.kept] for event in run.report.events]
    # 17 tokens with CLS enter block 0; what its cuts leave enters block 1, and what is left then block 2.
    assert run.report.tower_tokens == tuple((17 * n, kept[1][b] + n, kept[3][b] + n) for b, n in enumerate((1, 2)))


@pytest.mark.parametrize("batch", BATCHES)
def test_the_second_cut_sees_states_that_the_first_has_changed(batch):
    model, inputs = model_of("sdpa"), tiny_inputs(*BATCHES[batch])
    with prunekit.apply(model, piped((Norms, {"at": ["vision.0", "vision.1.mid"], "keep": [0.5, 0.25]}))) as run:
        model(**inputs)

    def longest(count):
        def rule(patches, keys, left, sizes):
            norms = patches.norm(dim=-1).masked_fill(~left, -1)
            return torch.zeros_like(left).scatter(1, norms.topk(count).indices, True), None, None

        return rule

    cuts = [(0, "after", longest(8)), (1, "mid", longest(4))]
    *_, left = naive_states(model, inputs["pixel_values"], cuts)
    kept = run.report.events[-1].kept
    counts = BATCHES[batch][0]
    assert kept == tuple(tuple(rows.flatten().nonzero()[:, 0].tolist()) for rows in left.split(list(counts)))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("batch", BATCHES)
def test_tome_with_sizes(batch, attention):
    """Matching by the block's own keys, weighted merges, and proportional attention in the blocks that follow."""
    model, inputs = model_of(attention), tiny_inputs(*BATCHES[batch])
    pipeline = piped((Merging, {"at": ["vision.0.mid", "vision.1.mid"], "r": 3}))
    with prunekit.apply(model, pipeline) as run:
        logits = model(**inputs).logits[:, -1]

    def matching(patches, keys, left, sizes):
        keep, given = torch.zeros_like(left), sizes.clone()
        weights = torch.zeros(*left.shape, left.shape[1], dtype=patches.dtype)
        for picture, here in enumerate(left):
            there = here.nonzero()[:, 0]
            found = tome(keys[picture].mean(0)[there], sizes[picture, there], 3)
            keep[picture, there] = found.keep
            weights[picture, there[:, None], there] = found.weights
            given[picture, there] = found.sizes
        return keep, weights, given

    cuts = [(0, "mid", matching), (1, "mid", matching)]
    expected, _, left = reference(model, inputs, cuts)
    assert (logits - expected).abs().max() < 1e-9
    assert int(left.sum()) == sum(run.report.kept_tokens) == 10 * len(left)
    sizes = run.report.events[-1].sizes
    assert all(sum(row) == 16 * count for row, count in zip(sizes, BATCHES[batch][0], strict=True))


@pytest.mark.parametrize("at", ["vision.0", "vision.0.mid"])
def test_merges_of_any_shape(at):
    """Weights that are different in every row and column and do not sum to one; pictures keep different numbers."""
    model, inputs = model_of("sdpa"), tiny_inputs((1, 2), (12, 9))
    with prunekit.apply(model, piped((Skewed, {"at": at}))) as run:
        logits = model(**inputs).logits[:, -1]
    kept = [len(row) for row in run.report.events[0].kept]

    def rule(patches, keys, left, sizes):
        return Skewed._choose(patches), Skewed._mix(patches), None

    expected, _, left = reference(model, inputs, [(0, prunekit.Site.parse(at).point, rule)])
    assert (logits - expected).abs().max() < 1e-9
    assert kept == [int(rows.sum()) for rows in left.split([1, 2])]
    assert len({int(rows.sum()) for rows in left}) > 1, "ragged"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_generate_beams_and_single_rows(attention):
    """`generate` encodes before the forward, and repeats pictures for beams."""
    model, inputs = model_of(attention), tiny_inputs((1, 2), (12, 9))
    pipeline = piped((ClsTopK, {"at": "vision.0", "keep": 0.5}), (Norms, {"at": 1, "keep": 0.25}))
    options = {"max_new_tokens": 5, "do_sample": False}
    with prunekit.apply(model, pipeline) as run:
        text = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :].tolist()
        events = run.report.events
        alone = tiny_inputs((1, 1), (12, 9))  # older transformers mix the pictures of rows with several under beams
        model(**alone)
        kept = run.report.events[0].kept
        beams = model.generate(**alone, **options, num_beams=3, num_return_sequences=3)
        assert run.report.events[0].kept == tuple(row for row in kept for _ in range(3)), "three beams a row"
        for row in range(2):
            one = row_of(inputs, row)
            assert model.generate(**one, **options)[0, one["input_ids"].shape[1] :].tolist() == text[row]
            assert run.report.events[0].kept == events[0].kept[row : row + 1]
    assert len(beams) == 6


def test_greedy_text_equals_the_naive_one():
    model, inputs = model_of("sdpa"), tiny_inputs((1, 2), (12, 9))
    with prunekit.apply(model, piped((Norms, {"at": "vision.0", "keep": 0.4}))) as run:
        text = model.generate(**inputs, max_new_tokens=6, do_sample=False)[:, inputs["input_ids"].shape[1] :].tolist()
    _, expected, _ = reference(model, inputs, replay(run.report, 3), steps=6)
    assert text == expected


def test_the_model_is_left_as_it_was():
    model, inputs = model_of("sdpa"), tiny_inputs((1,), 9)
    before = model(**inputs).logits
    with prunekit.apply(model, piped((Merging, {"at": "vision.0.mid"}), (ClsTopK, {"at": "encoder", "keep": 0.5}))):
        model(**inputs)
    assert torch.equal(model(**inputs).logits, before)
    changed = [name for name, module in model.named_modules() if "forward" in vars(module)]
    assert changed == []
