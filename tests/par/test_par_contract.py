"""The contract of PAR, on models of several families, in batches whose rows have different numbers of images.

The rows below say which test shows what; each name is a test of this folder, and one row there must be for each point.

1  dropping and skipping equals masking        test_random_plans_equal_masking, test_dropping_and_skipping_equals_masking
2  T = V and L = N is the base model, bitwise  test_everything_kept_is_the_base_model_to_the_bit
3  smaller budgets keep subsets                test_kept_sets_are_nested, test_budgets_of_flops_are_nested, test_several_cuts_of_one_ranking
4  T and L are exact                           test_every_pair_of_counts_is_met, test_counts_of_ragged_rows
5  cache lengths are the plan                  test_random_plans_equal_masking, test_cache_lengths_are_the_plan_and_skipped_layers_are_never_called
6  what is skipped is not called               test_no_part_of_a_skipped_layer_sees_a_row_that_skips_it
7  only the causal router ignores the question test_the_question_moves_tokens_only_where_they_see_it
8  noise: for candidates only, seeded, in sdpa test_noise_is_what_a_plain_softmax_adds, test_noise_is_for_candidates_only, test_noise_is_seeded_and_there_under_every_kernel
9  text stays, wherever images stand         test_images_are_seen_wherever_they_stand, test_text_stays_and_is_answered_from
10 rows are as they would be alone             test_rows_are_as_they_would_be_alone, test_padding_changes_nothing
11 training lowers the held-out KL             test_training_lowers_held_out_kl_below_chance_and_below_the_start
12 the base model is as it was                 test_training_spares_the_model_and_moves_the_router
13 killed and resumed is the same router       test_an_interrupted_training_gives_the_same_router_to_the_bit, test_kill_9_and_the_same_command_again_give_the_same_router
"""  # noqa: E501

from __future__ import annotations

import ast
import itertools
import re
from pathlib import Path

import pytest
import torch
from prunekit_strategies.par.config import RouterConfig
from prunekit_strategies.par.router import Noise
from prunekit_strategies.par.starting import random_router

import prunekit
from prunekit.families import find, shape_of
from prunekit.testing.tiny import BOS, IMAGE, IMAGE_SIZE, PER_IMAGE, tiny_inputs, tiny_llava
from prunekit.testing.tiny_families import row_of, tiny_batch, tiny_model
from prunekit.training.forced import deciding, shown
from prunekit.training.teacher import at_random, plainly
from prunekit.verify.equivalence import assert_equivalent, generate
from prunekit.verify.precision import Float64Throughout

FAMILIES = ("llava", "llava_onevision", "qwen2_vl", "qwen3_vl", "internvl", "idefics3")
ROWS = (("image",), (), ("image", "image"))
LAYERS = 6


def par(**keys) -> prunekit.Pipeline:
    stage = {"use": "par", "weights": None, "seed": 0, "width": 32, "protect": [], **keys}
    given = {"name": "par", "stages": [{k: v for k, v in stage.items() if k != "budget"}]}
    return prunekit.load(given | ({"budget": stage["budget"]} if "budget" in stage else {}))


def run(model, pipeline, inputs, tokens=1):
    with Float64Throughout(), prunekit.apply(model, pipeline) as attached:
        output = generate(model, inputs, max_new_tokens=tokens)
    return attached.report, torch.stack(output.logits, 1)


def skipped(report):
    return [plan.layers for plan in report.plans]


def test_the_table_names_tests_that_there_are():
    rows = re.findall(r"^(\d+) .*?((?:test_\w+(?:, )?)+)$", __doc__, re.M)
    assert [int(number) for number, _ in rows] == list(range(1, 14))
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in Path(__file__).parent.glob("test_*.py")]
    there = {node.name for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert {name for _, names in rows for name in names.split(", ")} <= there


# 1, 5


@pytest.mark.parametrize(("at", "keep"), [(0, 0.3), (2, 0.3), ([1, 4], [0.6, 0.2])], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_random_plans_equal_masking(family, at, keep):
    model = tiny_model(family)
    inputs = tiny_batch(model, ROWS)
    pipeline, found = par(at=at, keep=keep, keep_layers=3), set()
    for seed in range(2):
        with deciding(pipeline.stages[0], at_random(LAYERS, [10 * seed + row for row in range(len(ROWS))])):
            report = assert_equivalent(model, pipeline, inputs, steps=5).report
        found.update(frozenset(row) for row in skipped(report))
        assert all(len(row) == LAYERS - 3 for row in skipped(report))
    assert len(found) > 2 and any(b - a == 1 for row in found for a, b in itertools.pairwise(sorted(row)))


# 2


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_everything_kept_is_the_base_model_to_the_bit(family, dtype, attention):
    model = tiny_model(family, attention, dtype)
    inputs = tiny_batch(model, ROWS)
    dense = generate(model, inputs, max_new_tokens=3)
    with prunekit.apply(model, par(keep=1.0, keep_layers=LAYERS)) as attached:
        kept = generate(model, inputs, max_new_tokens=3)
    assert torch.equal(torch.stack(kept.logits), torch.stack(dense.logits))
    assert torch.equal(kept.sequences, dense.sequences) and attached.report.cost.decision_flops[0] > 0


# 3, 4


@pytest.mark.parametrize("family", FAMILIES)
def test_kept_sets_are_nested(family):
    model = tiny_model(family)
    inputs = tiny_batch(model, ROWS)
    fewer, tokens = [frozenset(range(LAYERS))] * len(ROWS), [frozenset()] * len(ROWS)
    for step in range(1, LAYERS + 1):
        report, _ = run(model, par(keep=step / LAYERS, keep_layers=step), inputs)
        kept, gone = [frozenset(row) for row in report.events[0].kept], skipped(report)
        assert all(now >= then for now, then in zip(kept, tokens, strict=True))
        assert all(now < then for now, then in zip(gone, fewer, strict=True))
        assert kept[1] == frozenset() and len(kept[0]) > len(tokens[0]) and len(kept[2]) > len(tokens[2])
        tokens, fewer = kept, gone


def test_budgets_of_flops_are_nested():
    model, inputs = tiny_llava(layers=8), tiny_inputs((1, 2), (9, 5))
    before = [frozenset()] * 2
    for share in (0.66, 0.7, 0.75, 0.8):
        report, _ = run(model, par(width=8, keep_layers=6, budget={"flops": share}), inputs)
        kept = [frozenset(row) for row in report.events[0].kept]
        assert all(now > then for now, then in zip(kept, before, strict=True)), share
        before = kept


def test_several_cuts_of_one_ranking():
    """What the second cut leaves is the best of what the first one leaves, and what one cut there would leave."""
    model, inputs = tiny_llava(), tiny_inputs((1, 2), (9, 5))
    twice, _ = run(model, par(at=[1, 4], keep=[0.6, 0.2]), inputs)
    first, last = ([frozenset(row) for row in event.kept] for event in twice.events)
    once, _ = run(model, par(at=4, keep=0.2), inputs)
    assert all(b < a for a, b in zip(first, last, strict=True))
    assert last == [frozenset(row) for row in once.events[0].kept] and [len(row) for row in first] == [10, 19]


def test_every_pair_of_counts_is_met():
    model, inputs = tiny_llava(), tiny_inputs((1,), 5)
    for tokens, layers in itertools.product(range(1, PER_IMAGE + 1), range(1, LAYERS + 1)):
        report, _ = run(model, par(keep_tokens=tokens, keep_layers=layers, at=0), inputs)
        assert report.kept_tokens == (tokens,) and len(report.events[0].kept[0]) == tokens
        assert [len(row) for row in skipped(report)] == [LAYERS - layers]
        assert report.layer_tokens[0][-1] == 6 + tokens


def test_counts_of_ragged_rows():
    """A number is that of each row that has tokens; a fraction is of each row's own."""
    model, inputs = tiny_llava(), tiny_inputs((1, 0, 3), (5, 6, 7))
    for count in (1, 7, PER_IMAGE):
        report, _ = run(model, par(keep_tokens=count, keep_layers=4), inputs)
        assert report.kept_tokens == (count, 0, count)
    for count in range(1, 3 * PER_IMAGE + 1, 5):
        report, _ = run(model, par(keep=count / (3 * PER_IMAGE), keep_layers=4), inputs)
        assert report.kept_tokens == (max(1, int(count / 3 + 0.5)), 0, count)


# 6


@pytest.mark.parametrize("images", [(1,), (1, 2, 1)], ids=["one", "rows that differ"])
def test_no_part_of_a_skipped_layer_sees_a_row_that_skips_it(images):
    """Rows that enter each part of each layer, in the prefill and in both steps after it."""
    model, inputs = tiny_llava(), tiny_inputs(images, (14, 6, 9)[: len(images)])
    parts = [dict(layer.named_modules()) for layer in model.model.language_model.layers]
    seen = [dict.fromkeys(own, 0) for own in parts]
    handles = []
    for number, own in enumerate(parts):
        for name in own.keys() - {"", "self_attn"}:

            def count(module, given, number=number, name=name):
                seen[number][name] += len(given[0])

            handles.append(own[name].register_forward_pre_hook(count))
    pipeline = par(keep=0.25, keep_layers=4)
    with deciding(pipeline.stages[0], at_random(LAYERS, [3, 1, 2])):
        report, _ = run(model, pipeline, inputs, tokens=3)
    for handle in handles:
        handle.remove()
    running = [sum(number not in row for row in skipped(report)) for number in range(LAYERS)]
    assert len(set(running)) > min(len(images), 2), "rows skip different layers"
    for number, rows in enumerate(running):
        assert all(seen[number][name] == 3 * rows for name in parts[number].keys() - {"", "self_attn"}), number


# 7


@pytest.mark.parametrize(("attention", "blind"), [("causal", True), ("bidirectional", False), ("text_first", False)])
def test_the_question_moves_tokens_only_where_they_see_it(attention, blind):
    model, inputs = tiny_llava(), tiny_inputs((1,), 9)
    other = dict(inputs)
    other["input_ids"] = inputs["input_ids"].clone()
    other["input_ids"][0, -4:] += 1  # all behind the image
    assert not (inputs["input_ids"][0, -4:] == IMAGE).any()
    same_tokens, same_layers = [], []
    for seed in range(6):
        pipeline = par(keep=0.5, keep_layers=3, seed=seed, width=512, depth=2, attention=attention)
        (mine, _), (theirs, _) = run(model, pipeline, inputs), run(model, pipeline, other)
        same_tokens.append(mine.events[0].kept == theirs.events[0].kept)
        same_layers.append(skipped(mine) == skipped(theirs))
    assert all(same_tokens) is blind and not all(same_layers)


# 8


def test_noise_is_what_a_plain_softmax_adds():
    """One block with a head that reads attention alone, against softmax(logits + noise) written out."""
    config = RouterConfig(8, 3, 1, 8, 2, 2, 4, 8, "bidirectional")
    router = random_router(config, 0).double().requires_grad_(False)
    block = router.blocks[0]
    block.down.weight.zero_()  # attention alone
    embeds = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(1)).double()
    there = torch.ones(1, 5, dtype=torch.bool)
    tokens, layers = router(embeds, there, there, Noise(2.0, (7,)))
    x = torch.cat([embeds, router.layer_tokens[None]], 1)
    heads = [(x / (x.square().mean(-1, keepdim=True) + config.eps).sqrt() @ part.weight.T).unflatten(-1, (2, 4))
             for part in (block.q, block.k, block.v)]  # fmt: skip
    angles = torch.arange(8.0)[:, None] * 10000.0 ** -torch.tensor([0.0, 0.5])
    turn = torch.polar(torch.ones(8, 2), angles).to(torch.complex128)[None, :, None]
    q, k = (torch.view_as_real(torch.complex(h[..., :2], h[..., 2:]) * turn).transpose(-1, -2).flatten(-2)
            for h in heads[:2])  # fmt: skip
    drawn = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(7 * 1009)).double()
    weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) / 2 + 2.0 * drawn).softmax(-1)
    x = x + torch.einsum("bhqk,bkhd->bqhd", weights, heads[2]).flatten(2) @ block.o.weight.T
    scores = (x / (x.square().mean(-1, keepdim=True) + config.eps).sqrt() @ router.score.weight.T)[..., 0]
    assert (torch.cat([tokens, layers], 1) - scores).abs().max() < 1e-6  # angles in float32
    assert drawn.std() == pytest.approx(1, abs=0.15)


def test_noise_is_for_candidates_only():
    """What the pipeline decides is what the learner says without noise, and noise changes it."""
    model, inputs, pipeline = tiny_llava(), tiny_inputs((1, 2), (9, 5)), par(keep=0.5, keep_layers=3, width=16)
    parts = find(model)
    learner = pipeline.stages[0].strategy.learner(shape_of(model), parts.layers, 10000.0)
    learner.router.double()
    report, _ = run(model, pipeline, inputs)
    with deciding(pipeline.stages[0], plainly(learner)) as decider:
        again, _ = run(model, pipeline, inputs)
    assert again.events == report.events and again.plans == report.plans
    seen = shown(decider.seen)
    plain = learner.scores(seen.embeds, seen.visual, seen.valid)
    noisy = learner.noisy(seen.embeds, seen.visual, seen.valid, 1.0, (1, 2))
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(plain, noisy, strict=True))


# 9


@pytest.mark.parametrize("place", ["first", "last", "between", "neighbours", "apart"])
def test_images_are_seen_wherever_they_stand(place):
    model = tiny_llava()
    words, image = torch.arange(20, 30), torch.full((PER_IMAGE,), IMAGE)
    pieces = {
        "first": [image, words], "last": [words, image, words[:1]], "between": [words[:2], image, words[2:]],
        "neighbours": [words[:1], image, image, words[1:]],
        "apart": [words[:5], image, words[5:6], image, words[6:]],
    }[place]  # fmt: skip
    ids = torch.cat([torch.tensor([BOS]), *pieces])[None]
    count = int((ids == IMAGE).sum()) // PER_IMAGE
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["pixel_values"] = torch.randn(count, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.float64)
    pipeline = par(keep=0.25, keep_layers=4)
    with deciding(pipeline.stages[0], at_random(LAYERS, [4])) as decider:
        found = assert_equivalent(model, pipeline, inputs, steps=5)
    seen = shown(decider.seen)
    assert torch.equal(seen.visual, ids == IMAGE) and bool(seen.valid.all())
    words_there = ids != IMAGE
    assert torch.equal(seen.embeds[words_there], model.get_input_embeddings()(ids[words_there]))
    features = model.get_image_features(inputs["pixel_values"]).pooler_output
    assert torch.equal(seen.embeds[~words_there], torch.cat(list(features)))
    told, _ = at_random(LAYERS, [4])(0, seen.embeds[0], seen.visual[0])
    best = told[~words_there[0]].topk(4 * count).indices.sort().values.tolist()
    assert list(found.report.events[0].kept[0]) == best, "those with the best scores stay"


@pytest.mark.parametrize("family", FAMILIES)
def test_text_stays_and_is_answered_from(family):
    """With one visual token left, every text token reaches the last layer and has its KV in each layer that runs."""
    model = tiny_model(family)
    inputs = tiny_batch(model, ROWS)
    report, _ = run(model, par(keep_tokens=1, keep_layers=5), inputs)
    for row, skips in enumerate(skipped(report)):
        text = report.prompt_tokens[row] - report.visual_tokens[row]
        assert report.kept_tokens[row] == min(1, report.visual_tokens[row])
        ends = [kv for layer, kv in enumerate(report.kv_tokens[row]) if layer >= 2 and layer not in skips]
        assert set(ends) == {text + report.kept_tokens[row]}


# 10


@pytest.mark.filterwarnings("ignore:no visual tokens")  # a row of text, alone
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_as_they_would_be_alone(family):
    model = tiny_model(family)
    inputs, pipeline = tiny_batch(model, ROWS, text=(4, 17, 9)), par(keep=0.4, keep_layers=4, width=512, seed=1)
    together, logits = run(model, pipeline, inputs, tokens=4)
    assert together.samples == 3 and inputs["attention_mask"].sum(1).unique().numel() == 3
    for row in range(3):
        alone, single = run(model, pipeline, row_of(inputs, row), tokens=4)
        assert together.events[0].kept[row] == (alone.events[0].kept[0] if ROWS[row] else ())
        assert together.plans[row] == alone.plans[0] and together.kv_tokens[row] == alone.kv_tokens[0]
        assert (logits[row] - single[0]).abs().max() < 1e-9
