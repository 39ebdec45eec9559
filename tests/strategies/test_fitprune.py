"""FitPrune: the authors' deletions, a twin by loops, and the fit against one made of lists that become shorter."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from asking import cases, stage_of
from golden_files import drawn
from loops import SEEDS, best, kept, sizes, some

import prunekit
from prunekit import Rows, SpecError, loading
from prunekit.errors import PrunekitError
from prunekit.families import shape_of
from prunekit.strategy.artefact import Artefact
from prunekit.testing.tiny import tiny_inputs, tiny_llava
from prunekit.training.calibrate import calibrate
from prunekit.training.calibrate import stage_of as calibrated_stage
from prunekit.training.data import source
from prunekit.verify.equivalence import assert_equivalent


def written(folder, left, shape=None, reduction=0.6):
    """An artefact for the tiny model, or for one with these numbers."""
    shape = shape or shape_of(tiny_llava())
    about = {"id": "tiny", "family": shape.family, "layers": shape.layers, "hidden": shape.hidden}
    result = {"reduction": reduction, "alpha": 0.5, "left": left}
    Artefact(prunekit.__version__, "fitprune", about, {"name": "none"}, result).write(folder / "fit.json")
    return str(folder / "fit.json")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", cases("fitprune", 4))
def test_the_authors_deletions(case, dtype):
    p, expected = case["params"], case["expected"]
    stage = stage_of("fitprune", at="2.mid")
    cross, own = stage.inputs["attention"]
    assert cross == Rows(layer="own", queries="after", heads="max", over="sum")
    assert own == Rows(layer="own", queries="visual", heads="max", over="mean")
    most = drawn(case, dtype)["attention"].amax(0)
    image = slice(p["image_start"], p["image_start"] + p["visual_tokens"])
    given = most[image.stop :, image].sum(0), most[image, image].mean(0)
    assert kept(stage, expected["count"], attention=given) == expected["kept_sorted"]
    assert p["visual_tokens"] - expected["count"] == expected["table_row"][p["layer"]]


@pytest.mark.parametrize("seed", SEEDS)
def test_it_keeps_what_a_loop_keeps(seed):
    visual, count = sizes(seed)
    cross, own = (some(seed + more, visual, ties=seed % 2 == 0).abs() for more in (0, 100))
    scores = [a * b for a, b in zip(cross.tolist(), own.tolist(), strict=True)]
    found = kept(stage_of("fitprune", at="2.mid"), count, attention=(cross, own))
    assert found == sorted(best(scores, count))


def test_the_table_gives_sites_and_budgets(tmp_path):
    """Layers that delete nothing are no sites; a fraction of 576 tokens is the count that it came from."""
    shape = dataclasses.replace(shape_of(tiny_llava()), visual_tokens=576)
    path = written(tmp_path, [1.0, 560 / 576, 560 / 576, 100 / 576, 1 / 576, 1 / 576])
    cuts = prunekit.load({"stages": [{"use": "fitprune", "calibration": path}]}).bind(shape).cuts
    assert [str(cut.site) for cut in cuts] == ["1.mid", "3.mid", "4.mid"]
    assert [cut.keep.count(576, 576) for cut in cuts] == [560, 100, 1]
    nothing = written(tmp_path, [1.0] * 6)
    (cut,) = prunekit.load({"stages": [{"use": "fitprune", "calibration": nothing}]}).bind(shape).cuts
    assert cut.keep.count(576, 576) == 576


def test_what_is_refused(tmp_path):
    shape = shape_of(tiny_llava())
    path = written(tmp_path, [0.5] * 6)
    for options, said in (
        ({}, r"calibration.*is missing; `prunekit calibrate` writes one, or name `at` and `keep`"),
        ({"calibration": path, "reduction": 0.5}, r"reduction.*the calibration is for 0\.6, not 0\.5"),
        ({"reduction": 1.0}, r"reduction.*is between 0 and 1"),
        ({"calibration": str(tmp_path / "none.json")}, "calibration"),
        ({"at": 2, "keep": 0.5}, r"another point of the layer: '2.mid'"),
    ):
        with pytest.raises(SpecError, match=said):
            prunekit.load({"stages": [{"use": "fitprune", **options}]}).bind(shape)
    with pytest.raises(SpecError, match="it is of a model with family llava, layers 6"):
        stage = {"use": "fitprune", "calibration": path}
        prunekit.load({"stages": [stage]}).bind(dataclasses.replace(shape, layers=7))
    with pytest.raises(SpecError, match="side by side"):
        prunekit.load({"stages": [stage]}).bind(dataclasses.replace(shape, cuts_inside=False))


@pytest.mark.parametrize("positions", ["keep", "renumber"])
def test_it_is_exact_behind_another(tmp_path, positions):
    path = written(tmp_path, [1.0, 0.7, 0.5, 0.5, 0.2, 0.1])
    pipeline = {
        "positions": positions,
        "stages": [{"use": "random", "keep": 0.75}, {"use": "fitprune", "calibration": path}],
    }
    found = assert_equivalent(tiny_llava(), pipeline, tiny_inputs(images=(1, 2)), steps=3)
    assert [len(one) for one in found.report.events[-1].kept] == [2, 3]


# The fit, on the bundled model.


@pytest.fixture(scope="module")
def fitted():
    """The strategy's own calibration on two prompts, the model and the prompts' inputs."""
    from prunekit.training.data import encode, order

    model, processor = loading.load("micro")
    data = source("micro-scenes")
    stage = calibrated_stage(prunekit.load({"stages": [{"use": "fitprune", "reduction": 0.5}]}), None)
    artefact = calibrate(stage, model, processor, data, 2, model_id="micro", name="micro-scenes")
    inputs = [encode(processor, [data[index]]) for index in order(len(data), 0, 2)]
    return artefact, model, inputs


def maps_of(layer, states, positions, rotary):
    """Head-max attention (s, s) of a llama layer, and the states behind its attention."""
    s = len(states)
    cos_sin = rotary(states[None], positions[None])
    attention = layer.self_attn
    normed = layer.input_layernorm(states[None])
    q, k = (p(normed).view(1, s, -1, attention.head_dim).transpose(1, 2) for p in (attention.q_proj, attention.k_proj))
    half = attention.head_dim // 2

    def turned(x):
        return x * cos_sin[0][:, None] + torch.cat([-x[..., half:], x[..., :half]], -1) * cos_sin[1][:, None]

    logits = turned(q) @ turned(k).repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(2, 3)
    causal = torch.ones(s, s, dtype=torch.bool).tril()
    maps = (logits / attention.head_dim**0.5).masked_fill(~causal, -torch.inf).softmax(-1)[0].amax(0)
    mixed, _ = attention(normed, cos_sin, None)
    return maps, states + mixed[0]


@torch.no_grad()
def fit(model, inputs, alpha, masses=None):
    """Visual tokens entering and leaving each layer, for one prompt, with lists that become shorter; and the masses."""
    text = model.model.language_model
    caught = []
    handle = text.layers[0].register_forward_pre_hook(lambda _, args: caught.append(args[0][0]))
    model(**inputs, use_cache=False)
    handle.remove()
    states, visual = caught[0], inputs["input_ids"][0] == model.config.image_token_id
    positions, after = torch.arange(len(states)), torch.arange(len(states)) > visual.nonzero()[-1]
    entered, left, sums = [], [], []
    for number, layer in enumerate(text.layers):
        maps, states = maps_of(layer, states, positions, text.rotary_emb)
        cross, own = maps[after][:, visual].sum(0).tolist(), maps[visual][:, visual].mean(0).tolist()
        sums.append((sum(cross), sum(own)))
        keep = torch.ones_like(visual)
        if masses is not None:
            low = []
            for scores, mass in zip((cross, own), masses[number], strict=True):
                order, gone, total = sorted(range(len(scores)), key=lambda i, s=scores: (s[i], i)), [], sum(scores)
                for i in order[:-1]:
                    total -= scores[i]
                    if total < (1 - alpha) * mass:
                        break
                    gone.append(i)
                low.append(set(gone))
            keep[visual.nonzero()[:, 0][sorted(low[0] & low[1])]] = False
        entered.append(int(visual.sum()))
        states, visual, positions, after = states[keep], visual[keep], positions[keep], after[keep]
        left.append(int(visual.sum()))
        states = states + layer.mlp(layer.post_attention_layernorm(states[None]))[0]
    return entered, left, sums


def test_the_fit_by_hand(fitted):
    """The smallest alpha of the bisection, and what the layers leave with it, in the authors' order of steps."""
    artefact, model, inputs = fitted
    shape = loading.load_shape("micro")
    masses = [fit(model, one, 0.0)[2] for one in inputs]

    def flops(before, after):
        inside = shape.attention_params * before + 2 * before**2 * shape.heads * shape.head_dim
        return inside + shape.mlp_params * after

    target = 0.5 * shape.layers * flops(144, 144)
    low, high, found = 0.0, 1.0, None
    for _ in range(7):
        alpha = (low + high) / 2
        counts = [fit(model, one, alpha, mass)[:2] for one, mass in zip(inputs, masses, strict=True)]
        used, deleted, reached = 0.0, [], False
        for layer in range(shape.layers):
            pairs = [(entered[layer], left[layer]) for entered, left in counts]
            rest = sum((shape.layers - layer) * flops(before, before) for before, _ in pairs) / 2
            if used + rest <= target:
                reached = True
                break
            used += sum(flops(*pair) for pair in pairs) / 2
            deleted.append(sum(before - after for before, after in pairs) // 2)
        reached = reached or used <= target
        low, high = (low, alpha) if reached else (alpha, high)
        if reached:
            deleted += [0] * (shape.layers - len(deleted))
            found = alpha, [max(144 - sum(deleted[: layer + 1]), 1) / 144 for layer in range(shape.layers)]
    assert artefact.result["alpha"] == found[0]
    assert artefact.result["left"] == pytest.approx(found[1], abs=1e-12)
    assert artefact.result["reduction"] == 0.5 and 0 < found[0] < 1


def test_what_it_saves(fitted, tmp_path):
    """The table it writes prunes the model that it was made on, and about as much as it was asked for."""
    artefact, model, inputs = fitted
    artefact.write(tmp_path / "fit.json")
    stage = {"use": "fitprune", "reduction": 0.5, "calibration": str(tmp_path / "fit.json")}
    with prunekit.apply(model, {"stages": [stage]}) as run, torch.no_grad():
        model(**inputs[0])
    visual = sum(run.report.layer_tokens[0]) / len(run.report.layer_tokens[0]) - (run.report.prompt_tokens[0] - 144)
    assert 0.3 * 144 < visual < 0.7 * 144


def test_more_than_can_be_saved():
    """All but one token leave in the first layer at most, and that layer has run its attention."""
    stage = calibrated_stage(prunekit.load({"stages": [{"use": "fitprune", "reduction": 0.99}]}), None)
    with pytest.raises(PrunekitError, match=r"0\.99 cannot be reached"):
        calibrate(stage, *loading.load("micro"), source("micro-scenes"), 1, model_id="micro", name="micro-scenes")
