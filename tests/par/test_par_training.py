"""Training routers: the teacher's measurements, the loss, a loop that learns, spares the model, survives a kill."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from prunekit_strategies.par import files

import prunekit
from prunekit import loading, plugins
from prunekit.errors import InputError, UnknownName, Unsupported
from prunekit.testing.tiny import IMAGE_SIZE
from prunekit.training import checkpoint, memory
from prunekit.training.answers import at_once, can_be_at_once, dense_answers, divergence, forced_logits
from prunekit.training.data import JsonLines, Sample, encode, order, source
from prunekit.training.forced import Shown
from prunekit.training.memory import Memory
from prunekit.training.preference import log_likelihood, loss_of
from prunekit.training.recipe import Recipe, read_recipe
from prunekit.training.teacher import Actions, Pairs, Teacher, plainly
from prunekit.training.trainer import Trainer, finished
from prunekit.training.visual_inputs import encoded_once

sys.path.insert(0, str(Path(__file__).parent.parent))
from tiny_checkpoint import save

ROUTER = {"use": "par", "weights": None, "seed": 0, "width": 16, "protect": [0]}
FAST = {"steps": 3, "batch": 4, "held_out": 4, "candidates": 3, "answer_tokens": 3, "lr": 1e-3, "measure_every": 2}


class Noise:
    """Prompts about noise, made from their number."""

    digest = "noise"

    def __init__(self, length: int = 64) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        rng = random.Random(index)
        image = Image.frombytes("RGB", (IMAGE_SIZE, IMAGE_SIZE), rng.randbytes(3 * IMAGE_SIZE**2))
        return Sample((image,), " ".join(f"w{rng.randrange(10, 120)}" for _ in range(rng.randrange(2, 9))))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("model") / "tiny", layers=6)


@pytest.fixture
def loaded(folder):
    return loading.load(folder)


def pipeline(**keys):
    return prunekit.load({"name": "par", "stages": [{**ROUTER, "keep": 0.25, "keep_layers": 4, **keys}]})


def trainer(loaded, out, given=None, say=lambda line: None, **changes) -> Trainer:
    recipe = Recipe(**{**FAST, **changes})
    return Trainer(*loaded, given or pipeline(), Noise(), recipe, out, "tiny", "noise", say)


def batch(loaded, numbers=(0, 1, 2)):
    return encode(loaded[1], [Noise()[n] for n in numbers])


def teacher(loaded, given=None, **changes) -> tuple[Teacher, Trainer]:
    made = trainer(loaded, Path("unused"), given, **changes)
    return made.teacher, made


# The teacher


def test_told_answers_without_pruning_have_the_dense_logits(loaded):
    model, inputs = loaded[0], batch(loaded)
    answers = dense_answers(model, inputs, 4)
    logits = forced_logits(model, inputs, answers)
    assert answers.tokens.shape == (3, 4) and bool(answers.valid.all())
    assert (logits - answers.logits).abs().max() < 1e-5
    assert divergence(answers, logits, Recipe()).abs().max() < 1e-6


def test_answers_end_with_their_end_token(loaded):
    model, inputs = loaded[0], batch(loaded)
    free = dense_answers(model, inputs, 4)
    end = int(free.tokens[0, 2])
    length = free.tokens[0].tolist().index(end) + 1
    model.generation_config.eos_token_id = [end, 9999]
    answers = dense_answers(model, inputs, 4)
    assert answers.valid[0].tolist() == [place < length for place in range(answers.tokens.shape[1])]
    assert torch.equal(answers.tokens[0, :length], free.tokens[0, :length])
    logits = forced_logits(model, inputs, answers)
    assert (logits - answers.logits)[answers.valid].abs().max() < 1e-5


def test_divergence_is_the_plain_sum(loaded):
    answers = dense_answers(loaded[0], batch(loaded), 3)
    other = answers.logits + torch.randn(answers.logits.shape, generator=torch.Generator().manual_seed(0))
    valid = answers.valid.clone()
    valid[0, 2:] = False
    answers = dataclasses.replace(answers, valid=valid)
    for recipe in (Recipe(), Recipe(kl="reverse"), Recipe(temperature=2.0)):
        found = divergence(answers, other, recipe)
        for row in range(3):
            total, count = 0.0, int(valid[row].sum())
            for t in range(count):
                p = (answers.logits[row, t] / recipe.temperature).softmax(-1)
                q = (other[row, t] / recipe.temperature).softmax(-1)
                p, q = (q, p) if recipe.kl == "reverse" else (p, q)
                total += float((p * (p.log() - q.log())).sum())
            assert found[row] == pytest.approx(total / count, rel=1e-4)


def test_what_is_no_number_is_never_the_best(loaded):
    """Half precision can overflow in a candidate; where the dense model gives no probability, nothing counts."""
    answers = dense_answers(loaded[0], batch(loaded), 3)
    logits = answers.logits.clone()
    logits[0, 0, 5] = torch.nan
    assert torch.isnan(divergence(answers, logits, Recipe())).tolist() == [True, False, False]
    impossible = answers.logits.clone()
    impossible[:, :, 5] = -torch.inf
    surely = divergence(dataclasses.replace(answers, logits=impossible), answers.logits, Recipe())
    assert bool(torch.isfinite(surely).all())
    tell, made = teacher(loaded, candidates=3)
    decided, count = tell._decided, iter((0, 1, 2))

    def broken(*given):
        kl, *rest = decided(*given)
        number = next(count)
        return (kl.masked_fill(torch.tensor([number == 1, True, False]), torch.nan), *rest)

    tell._decided = broken
    pairs, _ = tell.pairs(made.learner, batch(loaded), answers, [1, 2, 3])
    assert bool(torch.isfinite(pairs.kl).all()) and not pairs.useful[1]
    assert pairs.kl[1, 0] == pairs.kl[:, 0].max() and pairs.useful[0] and pairs.kl[:, 0].argmin() != 1


def test_a_decision_is_run_as_inference_runs_it(loaded):
    """The KL of the router's own decision, measured by hand under the pipeline as a user has it."""
    tell, made = teacher(loaded)
    inputs = batch(loaded)
    answers = tell.answers(inputs)
    kl, actions, seen = tell.decide(inputs, answers, plainly(made.learner))
    with prunekit.apply(loaded[0], pipeline()) as run:
        logits = forced_logits(loaded[0], inputs, answers)
    assert torch.equal(kl, divergence(answers, logits, tell.recipe)) and kl.min() > 0
    assert actions.tokens.sum(1).tolist() == [4, 4, 4] and actions.layers.sum(1).tolist() == [4, 4, 4]
    for row, plan in enumerate(run.report.plans):
        assert [n for n in range(6) if not actions.layers[row, n]] == sorted(plan.layers)
        places = seen.visual[row].nonzero()[:, 0][list(run.report.events[0].kept[row])]
        assert torch.equal(actions.tokens[row].nonzero()[:, 0], places)


def test_the_router_sees_the_prompt_alone(loaded):
    tell, made = teacher(loaded)
    inputs = batch(loaded)
    _, _, seen = tell.decide(inputs, tell.answers(inputs), plainly(made.learner))
    assert seen.lengths == inputs["attention_mask"].sum(1).tolist()


def test_a_decision_after_another_stage_knows_which_tokens_are_left(loaded):
    given = prunekit.load({"name": "two", "stages": [{"use": "stride", "keep": 0.5}, {**ROUTER, "keep_tokens": 3}]})
    tell, made = teacher(loaded, given)
    inputs = batch(loaded)
    _, actions, seen = tell.decide(inputs, tell.answers(inputs), plainly(made.learner))
    assert seen.visual.sum(1).tolist() == [8, 8, 8] and actions.tokens.sum(1).tolist() == [3, 3, 3]
    scores = made.learner.scores(seen.embeds, seen.visual, seen.valid)[0]
    for row in range(3):
        best = scores[row].masked_fill(~seen.visual[row], -torch.inf).topk(3).indices
        assert set(best.tolist()) == set(actions.tokens[row].nonzero()[:, 0].tolist())


def test_pairs_are_the_best_and_the_worst_of_candidates_that_differ_by_seeded_noise(loaded):
    tell, made = teacher(loaded, candidates=5)
    inputs = batch(loaded)
    answers = tell.answers(inputs)
    pairs, _ = tell.pairs(made.learner, inputs, answers, [1, 2, 3])
    again, _ = tell.pairs(made.learner, inputs, answers, [1, 2, 3])
    other, _ = tell.pairs(made.learner, inputs, answers, [4, 5, 6])
    assert pairs.kl.shape == (5, 3) and torch.equal(pairs.kl, again.kl)
    assert torch.equal(pairs.kl[0], other.kl[0]) and not torch.equal(pairs.kl[1:], other.kl[1:])
    assert bool((pairs.better.difference(pairs.worse)[pairs.useful] > 0).all()) and bool(pairs.useful.any())
    # A candidate's seed belongs to its prompt, so another batch gives the same.
    single, _ = tell.pairs(made.learner, batch(loaded, (1,)), tell.answers(batch(loaded, (1,))), [2])
    assert (single.kl[:, 0] - pairs.kl[:, 1]).abs().max() < 1e-5


def ragged(loaded):
    """Prompts of several lengths and one or two images, with answers of one to four tokens."""
    samples = [Noise()[n] for n in range(4)]
    samples[1] = Sample(samples[1].images * 2, samples[1].prompt)
    inputs = encode(loaded[1], samples)
    answers = dense_answers(loaded[0], inputs, 4)
    valid = torch.arange(4) < torch.tensor([[3], [1], [4], [2]])
    tokens = answers.tokens.masked_fill(answers.tokens == 3, 7)  # a random model may say <image>
    return inputs, dataclasses.replace(answers, tokens=tokens, valid=valid)


@pytest.mark.parametrize(
    "keys",
    [
        {"keep_layers": 6}, {}, {"at": [1, 3], "keep": [0.5, 0.25]}, {"at": "4.mid"}, {"at": "encoder"},
        {"route_at": 2, "at": [2, 4], "keep": [0.5, 0.25]},
    ],
)
def test_one_forward_over_prompt_and_answer_gives_what_decoding_gives(loaded, keys):
    """Padded on the left, of several lengths and numbers of images, with rows that skip different layers."""
    inputs, answers = ragged(loaded)
    tell, made = teacher(loaded, pipeline(**keys))
    found = {}
    for once in (True, False):
        tell.alone = once
        found[once] = tell.decide(inputs, answers, plainly(made.learner))
    assert len(set(inputs["attention_mask"].sum(1).tolist())) == 4 and found[True][0].min() > 0
    assert (found[True][0] - found[False][0]).abs().max() < 1e-5
    assert torch.equal(found[True][1].tokens, found[False][1].tokens)
    assert torch.equal(found[True][1].layers, found[False][1].layers)
    apart = (found[True][2].embeds - found[False][2].embeds).abs().max()
    assert apart <= (1e-5 if "route_at" in keys else 0), "states inside the decoder are rounded, embeddings are not"
    model = loaded[0]
    logits = at_once(model, inputs, answers) - forced_logits(model, inputs, answers)
    assert logits[answers.valid].abs().max() < 1e-5


def test_what_cannot_be_one_forward_is_decoded(loaded):
    inputs, answers = ragged(loaded)
    assert can_be_at_once(inputs, answers, (3,))
    assert not can_be_at_once(inputs, answers, (3, int(answers.tokens[0, 0])))
    assert not can_be_at_once({**inputs, "token_type_ids": torch.zeros_like(inputs["input_ids"])}, answers, (3,))
    padded = {**inputs, "attention_mask": inputs["attention_mask"].flip(1)}
    assert not can_be_at_once(padded, answers, (3,))
    two = [{"use": "skip_layers", "layers": [3]}, {**ROUTER, "keep": 0.25}]
    assert not teacher(loaded, prunekit.load({"name": "two", "stages": two}))[0].alone
    assert teacher(loaded)[0].alone


def test_candidates_share_what_the_tower_says(loaded):
    model, inputs = loaded[0], batch(loaded)
    tell, made = teacher(loaded, candidates=4)
    plain, _ = tell.pairs(made.learner, inputs, tell.answers(inputs), [1, 2, 3])
    calls: list[int] = []
    hook = model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    with tell.encoding_once():
        shared, _ = tell.pairs(made.learner, inputs, tell.answers(inputs), [1, 2, 3])
    hook.remove()
    assert len(calls) == 1 and torch.equal(plain.kl, shared.kl)
    other = batch(loaded, (3, 4, 5))
    with encoded_once(made.parts):
        features = [model.model.get_image_features(pixel_values=one["pixel_values"]) for one in (inputs, other, inputs)]
    assert features[0] is features[2] and features[0] is not features[1]
    assert "get_image_features" not in vars(model.model)


def test_a_router_with_several_cuts_is_trained_by_how_long_tokens_stay(loaded):
    tell, made = teacher(loaded, pipeline(at=[1, 3], keep=[0.5, 0.25]), candidates=3)
    inputs = batch(loaded)
    answers = tell.answers(inputs)
    _, actions, seen = tell.decide(inputs, answers, plainly(made.learner))
    scores = made.learner.scores(seen.embeds, seen.visual, seen.valid)[0].masked_fill(~seen.visual, -torch.inf)
    for row in range(3):
        order = scores[row].argsort(descending=True)
        assert actions.tokens[row][order[:8]].tolist() == [1.0] * 4 + [0.5] * 4 and actions.tokens[row].sum() == 6
    scores = scores.detach()
    one = log_likelihood((scores, torch.zeros(3, 6)), actions, seen, tell)[0]
    chosen, logits = (x[0][seen.visual[0]] for x in (actions.tokens, scores))
    cuts = [by_hand(logits, chosen >= least, [True] * 16, True) for least in (0.5, 1.0)]
    assert torch.allclose(one, sum(cuts) / 2 + F.logsigmoid(torch.tensor(0.0)), atol=1e-6)


def test_noise_on_scores_is_seeded_by_the_prompt(loaded):
    tell, made = teacher(loaded, noise_on="scores", noise=3.0, candidates=4)
    inputs = batch(loaded)
    answers = tell.answers(inputs)
    pairs, _ = tell.pairs(made.learner, inputs, answers, [1, 2, 3])
    single, _ = tell.pairs(made.learner, batch(loaded, (1,)), tell.answers(batch(loaded, (1,))), [2])
    assert (single.kl[:, 0] - pairs.kl[:, 1]).abs().max() < 1e-5
    kept = [one.tokens[0].nonzero()[:, 0].tolist() for one in pairs.tried]
    assert len({*map(tuple, kept)}) == 4


@pytest.mark.parametrize("noise_on", ["scores", "attention"])
def test_candidates_that_vary_apart_differ_by_turns_in_layers_and_in_tokens(loaded, noise_on):
    tell, made = teacher(loaded, noise_on=noise_on, noise=3.0, candidates=7, vary="apart")
    inputs = batch(loaded)
    plain, *others = tell.pairs(made.learner, inputs, tell.answers(inputs), [1, 2, 3])[0].tried
    for number, one in enumerate(others, 1):
        same = "tokens" if number % 2 else "layers"
        assert torch.equal(getattr(one, same), getattr(plain, same)), number
    assert any(not torch.equal(one.layers, plain.layers) for one in others[0::2])
    assert any(not torch.equal(one.tokens, plain.tokens) for one in others[1::2])
    tokens_only = prunekit.load({"stages": [{**ROUTER, "keep": 0.25}]})
    alone, made = teacher(loaded, tokens_only, noise_on=noise_on, noise=3.0, candidates=3, vary="apart")
    plain, *others = alone.pairs(made.learner, inputs, alone.answers(inputs), [1, 2, 3])[0].tried
    assert all(not torch.equal(one.tokens, plain.tokens) for one in others), "what is not decided on takes no turns"


def test_noise_on_scores_is_in_units_of_the_scores(loaded):
    """What a ranking by scores keeps, no factor changes; nor, then, what noise makes of it."""
    tell, made = teacher(loaded, noise_on="scores", noise=0.7, candidates=4)
    inputs = batch(loaded)
    answers = tell.answers(inputs)
    plain, _ = tell.pairs(made.learner, inputs, answers, [1, 2, 3])
    made.learner.module.score.weight.data.mul_(1024)
    scaled, _ = tell.pairs(made.learner, inputs, answers, [1, 2, 3])
    assert torch.equal(plain.kl, scaled.kl) and plain.useful.any()
    made.learner.module.score.weight.data.zero_()
    alike, _ = tell.pairs(made.learner, inputs, answers, [1, 2, 3])
    assert len({tuple(one.layers[0].tolist()) for one in alike.tried}) > 1


def test_a_model_in_bfloat16_is_trained(folder, tmp_path):
    made = trainer(loading.load(folder, "bfloat16"), tmp_path / "r", router_dtype="bfloat16")
    curve = made.run().curve
    assert made.model.dtype == torch.bfloat16 and all(0 < row["held_out"] < 100 for row in curve)
    assert all(parameter.dtype == torch.float32 for parameter in made.learner.module.parameters())


def test_what_cannot_be_trained_is_refused(loaded):
    two = [{"use": "stride", "keep": 0.5}]
    with pytest.raises(Unsupported, match="one router"):
        teacher(loaded, prunekit.load({"name": "none", "stages": two}))
    with pytest.raises(Unsupported, match="between the decision"):
        stages = [{"use": "random", "at": 1, "keep": 0.5}, {**ROUTER, "at": 2, "keep": 0.25}]
        teacher(loaded, prunekit.load({"name": "between", "stages": stages}))


# The loss


def by_hand(logits, chosen, there, mean):
    each = [F.logsigmoid(x if c else -x) for x, c, t in zip(logits, chosen, there, strict=True) if t]
    return sum(each) / (len(each) if mean else 1)


@pytest.mark.parametrize("likelihood", ["normalised", "summed"])
@pytest.mark.parametrize("loss", ["cpl", "dpo"])
def test_the_loss_is_that_of_the_formula(loaded, likelihood, loss):
    tell, _ = teacher(loaded, likelihood=likelihood, loss=loss)
    assert tell.free == (1, 2, 3, 4, 5)
    generator = torch.Generator().manual_seed(0)
    visual = torch.tensor([[0, 1, 1, 1, 0], [0, 1, 1, 0, 0]]).bool()
    seen = Shown(torch.zeros(2, 5, 4), visual, torch.ones_like(visual))
    scores, reference = (
        (torch.randn(2, 5, generator=generator), torch.randn(2, 6, generator=generator)) for _ in range(2)
    )
    better, worse = (
        Actions(torch.rand(2, 5, generator=generator) < 0.5, torch.rand(2, 6, generator=generator) < 0.5)
        for _ in range(2)
    )
    pairs = Pairs(better, worse, torch.tensor([True, False]), torch.zeros(2, 2))
    mean, free = likelihood == "normalised", [False] + [True] * 5

    def log_p(of, actions, row):
        tokens = by_hand(of[0][row], actions.tokens[row], visual[row], mean)
        return tokens + by_hand(of[1][row], actions.layers[row], free, mean)

    assert torch.allclose(log_likelihood(scores, better, seen, tell)[1], log_p(scores, better, 1))
    alpha, bias = (5.0, 1.0) if mean else (0.1, 0.5)
    margin = alpha * (log_p(scores, better, 0) - bias * log_p(scores, worse, 0))
    if loss == "dpo":
        ours, theirs = ([log_p(of, a, 0) for a in (better, worse)] for of in (scores, reference))
        margin = 0.1 * ((ours[0] - theirs[0]) - (ours[1] - theirs[1]))
    found = loss_of(scores, reference if loss == "dpo" else None, pairs, seen, tell)
    assert found.pairs == 1 and torch.allclose(found.preference, -F.logsigmoid(margin))
    sparsity = 0.0
    for row in range(2):
        for logits, chosen, there in (
            (scores[0], better.tokens, visual[row]),
            (scores[1], better.layers, torch.tensor(free)),
        ):
            gap = logits[row][there].sigmoid().mean() - chosen[row][there].float().mean()
            sparsity += float(gap**2)
    assert float(found.sparsity) == pytest.approx(sparsity, rel=1e-5)


def test_each_candidate_is_preferred_to_every_worse_one_by_how_much_worse_it_is(loaded):
    tell, _ = teacher(loaded, pairing="all", candidates=3)
    generator = torch.Generator().manual_seed(0)
    seen = Shown(torch.zeros(2, 5, 4), torch.ones(2, 5).bool(), torch.ones(2, 5).bool())
    scores = torch.randn(2, 5, generator=generator), torch.randn(2, 6, generator=generator)
    tried = tuple(
        Actions(torch.rand(2, 5, generator=generator) < 0.5, torch.rand(2, 6, generator=generator) < 0.5)
        for _ in range(3)
    )
    kl = torch.tensor([[0.5, 1.0], [0.1, 1.0], [0.4, 1.0]])
    pairs = Pairs(tried[1], tried[0], torch.tensor([True, False]), kl, tried)
    likely = [log_likelihood(scores, one, seen, tell)[0] for one in tried]
    ranks = {(1, 0): 0.4, (1, 2): 0.3, (2, 0): 0.1}
    wanted = sum(gap / 0.8 * -F.logsigmoid(5.0 * (likely[a] - likely[b])) for (a, b), gap in ranks.items())
    assert torch.allclose(loss_of(scores, None, pairs, seen, tell).preference, wanted)


def test_a_group_without_a_budget_does_not_count(loaded):
    seen = Shown(torch.zeros(1, 4, 4), torch.ones(1, 4).bool(), torch.ones(1, 4).bool())
    scores = torch.zeros(1, 4), torch.full((1, 6), 3.0)
    actions = Actions(torch.ones(1, 4).bool(), torch.zeros(1, 6).bool())
    tokens_only = prunekit.load({"name": "t", "stages": [{**ROUTER, "keep": 0.25}]})
    layers_only = prunekit.load({"name": "l", "stages": [{**ROUTER, "keep_layers": 4}]})
    values = [
        float(log_likelihood(scores, actions, seen, teacher(loaded, one)[0])) for one in (tokens_only, layers_only)
    ]
    assert values == [
        pytest.approx(float(F.logsigmoid(torch.tensor(0.0)))),
        pytest.approx(float(F.logsigmoid(torch.tensor(-3.0)))),
    ]


# The loop


def test_training_spares_the_model_and_moves_the_router(loaded, tmp_path):
    model = loaded[0]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    lines: list[str] = []
    made = trainer(loaded, tmp_path / "r", say=lines.append)
    start = {name: value.clone() for name, value in made.learner.module.state_dict().items()}
    progress = made.run()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    moved = {name for name, value in made.learner.module.state_dict().items() if not torch.equal(value, start[name])}
    assert {"layer_tokens", "score.weight", "project.weight"} <= moved
    assert progress.step == 3 and [row["step"] for row in progress.curve] == [0, 2, 3]
    assert len(lines) == 4 and all("difference" in line for line in lines[1:])
    assert not (tmp_path / "r" / checkpoint.NAME).exists() and finished(tmp_path / "r")


def test_a_trained_router_is_used_by_its_folder_and_says_how_it_was_made(loaded, tmp_path):
    made = trainer(loaded, tmp_path / "r")
    made.run()
    use = {"use": "par", "weights": str(tmp_path / "r"), "protect": [0], "keep": 0.5, "keep_layers": 3}
    inputs = batch(loaded)
    with prunekit.apply(loaded[0], {"name": "trained", "stages": [use]}) as run:
        loaded[0](**inputs)
    assert run.report.kept_tokens == (8, 8, 8) and run.report.notes == ()
    config = json.loads((tmp_path / "r" / "config.json").read_text())
    assert config["model"]["id"] == "tiny" and config["training"]["steps"] == 3
    assert config["training"]["data"]["digest"] == "noise" and config["training"]["recipe"]["lr"] == 1e-3
    card = (tmp_path / "r" / "README.md").read_text()
    assert "| chance |" in card and "keep_layers: 4" in card and "- `lr`: 0.001" in card


def test_a_trained_router_learns_on(loaded, tmp_path):
    trainer(loaded, tmp_path / "first").run()
    made = trainer(
        loaded, tmp_path / "second", pipeline(weights=str(tmp_path / "first"), seed=None, width=None), seed=1
    )
    start = {name: value.clone() for name, value in made.learner.module.state_dict().items()}
    assert torch.equal(start["score.weight"], files.load(tmp_path / "first").score.weight)
    made.run()
    assert not torch.equal(files.load(tmp_path / "second").score.weight, start["score.weight"])


def test_a_trained_router_takes_any_scatter(loaded, tmp_path):
    """No weight depends on it: at use, where the file stays as it is, and at the start of a training that saves it."""
    trainer(loaded, tmp_path / "first").run()

    def kept(**keys):
        stage = {"use": "par", "weights": str(tmp_path / "first"), "keep": 0.25, **keys}
        with prunekit.apply(loaded[0], {"name": "par", "stages": [stage]}) as run:
            loaded[0](**batch(loaded, (1,)))
        return run.report.events[0].kept[0]

    own, even = kept(), kept(scatter=1e6)
    golden = sorted(range(16), key=lambda place: -((place + 1) * (5**0.5 - 1) / 2 % 1))[:4]
    assert even == tuple(sorted(golden)) != own == kept(scatter=0.0) == kept()
    given = pipeline(weights=str(tmp_path / "first"), seed=None, width=None, scatter=2.0)
    trainer(loaded, tmp_path / "second", given, steps=0).run()
    assert files.read(tmp_path / "second").architecture.scatter == 2.0
    assert files.read(tmp_path / "first").architecture.scatter == 0.0


def test_no_steps_save_the_router_as_it_starts(loaded, tmp_path):
    given = pipeline(width="model", init="llm_first")
    made = trainer(loaded, tmp_path / "r", given, steps=0)
    assert [len(group) > 0 for group in made.learner.parameters().values()] == [True, True]
    made.run()
    with prunekit.apply(loaded[0], {"stages": [{"use": "par", "weights": str(tmp_path / "r"), "keep": 0.5}]}):
        loaded[0](**batch(loaded))


def test_a_step_learns_again_from_the_batches_before_it(loaded, tmp_path):
    """As many steps of the optimizer, of batches that are what they were."""
    made = trainer(loaded, tmp_path / "r", replay=3, remember=2, steps=4, save_every=4)
    held = {}
    learn, put = made._learn, Memory.put

    def kept(memory, step, pairs, seen):
        held[step] = (pairs, seen)
        put(memory, step, pairs, seen)

    learned = []
    made._learn = lambda step, pairs, seen: learned.append((step, pairs, seen)) or learn(step, pairs, seen)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Memory, "put", kept)
        made.run()
    assert [step for step, *_ in learned] == [1] * 3 + [2] * 4 + [3] * 4 + [4] * 4
    again = [(step - 1, pairs, seen) for step, pairs, seen in learned if held[step - 1][0] is not pairs]
    assert len(again) == 11
    for step, pairs, seen in again:
        mine = [old for old in range(max(0, step - 1), step + 1) if torch.equal(held[old][0].kl, pairs.kl)]
        assert len(mine) == 1
        before, shown = held[mine[0]]
        for name in ("embeds", "visual", "valid"):
            assert torch.equal(getattr(shown, name), getattr(seen, name))
        for one, two in zip(
            (before.better, before.worse, *before.tried), (pairs.better, pairs.worse, *pairs.tried), strict=True
        ):
            assert torch.equal(one.tokens, two.tokens) and torch.equal(one.layers, two.layers)
        assert torch.equal(before.useful, pairs.useful)
    assert not (tmp_path / "r" / memory.NAME).exists(), "a router is all that stays"


def test_a_batch_that_is_gone_ends_the_training(loaded, tmp_path):
    made = trainer(loaded, tmp_path / "r", replay=2, steps=2)
    made._step(0)
    for file in (tmp_path / "r" / memory.NAME).iterdir():
        file.write_bytes(b"half")
    with pytest.raises(InputError, match=r"cannot be read, and the training learns from it again.*--restart"):
        list(made.memory.draw(0))


@pytest.mark.parametrize("replay", [0, 2])
def test_an_interrupted_training_gives_the_same_router_to_the_bit(loaded, tmp_path, replay):
    changes = {"steps": 4, "rounds": 2, "save_every": 1, "replay": replay}
    trainer(loaded, tmp_path / "whole", **changes).run()
    for stop in (1, 3):  # before and after the second round begins

        class Stop(Exception):
            pass

        def say(line, stop=stop, stopped=Stop):
            if line.startswith(f"step {stop + 1}/"):
                raise stopped

        with pytest.raises(Stop):
            trainer(loaded, tmp_path / str(stop), say=say, **changes).run()
        assert (tmp_path / str(stop) / checkpoint.NAME).is_file() and not finished(tmp_path / str(stop))
        trainer(loaded, tmp_path / str(stop), **changes).run()
        for name in ("router.safetensors", "config.json"):
            assert (tmp_path / str(stop) / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_checkpoint_of_another_training_is_refused(loaded, tmp_path):
    made = trainer(loaded, tmp_path)
    made.teacher.pairs = None  # the first step fails, after which a checkpoint is written by hand
    checkpoint.save(
        tmp_path, checkpoint.Progress(1), made.identity, made.learner.module, made.base.module, made.optimizer
    )
    with pytest.raises(InputError, match="another training: recipe differ"):
        trainer(loaded, tmp_path, lr=0.5).run()
    (tmp_path / checkpoint.NAME).write_bytes(b"nonsense")
    with pytest.raises(InputError, match="is no checkpoint"):
        trainer(loaded, tmp_path).run()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_training_lowers_held_out_kl_below_chance_and_below_the_start(loaded, tmp_path, seed):
    changes = {"seed": seed, "steps": 20, "batch": 8, "held_out": 16, "candidates": 4, "lr": 1e-2, "measure_every": 20}
    given = pipeline(protect=[], keep=1.0, keep_layers=4, seed=seed)
    curve = trainer(loaded, tmp_path / "r", given, **changes).run().curve
    assert curve[-1]["held_out"] < min(curve[0]["held_out"], curve[0]["random"])


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = {paths!r}
from test_par_training import FAST, Noise, pipeline
from prunekit import loading
from prunekit.training.recipe import Recipe
from prunekit.training.trainer import Trainer

def say(line):
    if line.startswith("step " + sys.argv[3] + "/"):
        os.kill(os.getpid(), signal.SIGKILL)

recipe = Recipe(**{{**FAST, "steps": 3, "save_every": 1}})
Trainer(*loading.load(sys.argv[1]), pipeline(), Noise(), recipe, Path(sys.argv[2]), "tiny", "noise", say).run()
"""


@pytest.mark.slow
def test_kill_9_and_the_same_command_again_give_the_same_router(folder, tmp_path):
    here = Path(__file__).parent
    code = KILLED.format(paths=[str(here), str(here.parent)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

    def train(out, until):
        command = [sys.executable, "-c", code, str(folder), str(out), until]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)

    assert train(tmp_path / "killed", "2").returncode == -signal.SIGKILL
    assert not finished(tmp_path / "killed")
    for out in ("killed", "whole"):
        done = train(tmp_path / out, "never")
        assert done.returncode == 0, done.stderr
    killed, whole = ((tmp_path / out / "router.safetensors").read_bytes() for out in ("killed", "whole"))
    assert killed == whole


# Options and data


def test_a_recipe_from_a_file_and_from_texts(tmp_path):
    (tmp_path / "r.yaml").write_text("lr: 1e-3\nbatch: 8\n")
    recipe = read_recipe(tmp_path / "r.yaml", ["batch=16", "loss=dpo", "steps=5"])
    assert (recipe.lr, recipe.batch, recipe.loss, recipe.total) == (1e-3, 16, "dpo", 5)
    assert Recipe(samples=100, batch=32).total == 4
    assert [Recipe(steps=5, rounds=2).round_of(step) for step in range(5)] == [0, 0, 0, 1, 1]
    for changes, message in (
        (["rate=3"], "rate: unknown key"), (["lr=-1"], "lr: must be above 0"), (["batch=two"], "batch: must be a who"),
        (["loss"], "not key=value"), (["candidates=1"], "candidates: must be at least 2"), (["warmup=1"], "warmup: is"),
        (["kl=sideways"], "kl: must be 'forward' or 'reverse'"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            read_recipe(None, changes)
    (tmp_path / "r.yaml").write_text("- 1\n")
    with pytest.raises(InputError, match="must be a mapping"):
        read_recipe(tmp_path / "r.yaml", [])
    with pytest.raises(InputError, match="is no recipe"):
        read_recipe(tmp_path / "none.yaml", [])


def test_prompts_from_a_file(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    lines = [{"image": "a.png", "prompt": "What?"}, {"image": ["a.png", "a.png"], "prompt": "Two?"}]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    data = source(str(path))
    assert isinstance(data, JsonLines) and len(data) == 2
    assert data[1].prompt == "Two?" and len(data[1].images) == 2
    path.write_text('{"image": "b.png", "prompt": "What?"}\n')
    changed = source(str(path))
    assert changed.digest != data.digest
    with pytest.raises(InputError, match=r"b\.png"):
        changed[0]
    for text in ("[]", "{}", '{"image": [], "prompt": "x"}', '{"image": "a.png", "prompt": ""}', "no"):
        path.write_text(text + "\n")
        with pytest.raises(InputError, match=r"data\.jsonl:1: is not a prompt"):
            source(str(path))
    path.write_text("\n")
    with pytest.raises(InputError, match="holds no prompts"):
        source(str(path))
    with pytest.raises(InputError, match="cannot read"):
        source(str(tmp_path / "none.jsonl"))
    with pytest.raises(UnknownName, match="micro-scenes"):
        source("micro-scene")


def test_the_order_of_the_data():
    numbers = order(10, 0, 25)
    assert sorted(numbers[:10]) == sorted(numbers[10:20]) == list(range(10)) and numbers[:10] != numbers[10:20]
    assert numbers == order(10, 0, 25) != order(10, 1, 25)


def test_too_little_data(loaded, tmp_path):
    with pytest.raises(InputError, match="the data holds 64 prompts; 61 are held out"):
        trainer(loaded, tmp_path, held_out=61)


def test_a_plugin_brings_data():
    class Plugin:
        @prunekit.hookimpl
        def prunekit_data(self):
            return {"noise": "test_par_training:Noise"}

    plugins.register(Plugin(), name="noisy")
    try:
        assert len(source("noise")) == 64
    finally:
        plugins.unregister("noisy")


def test_the_command(folder, tmp_path, capsys):
    from prunekit.cli import main

    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    (tmp_path / "data.jsonl").write_text('{"image": "a.png", "prompt": "w10 w11"}\n' * 10)
    given = {"name": "par", "stages": [{**ROUTER, "keep": 0.25}]}
    (tmp_path / "p.json").write_text(json.dumps(given) + "\n")
    command = ["train", str(tmp_path / "p.json"), "--model", str(folder), "--data", str(tmp_path / "data.jsonl")]
    command += ["--out", str(tmp_path / "out"), *(f"--train={key}={value}" for key, value in FAST.items())]
    assert main.main([*command, "--train=steps=1", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["steps"] == 1 and told["random"] > 0
    assert main.main([*command, "--train=steps=1"]) == 2
    assert "holds a router already" in capsys.readouterr().err
    assert main.main([*command, "--train=steps=1", "--restart"]) == 0
    assert "held-out KL" in capsys.readouterr().out
