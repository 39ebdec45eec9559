"""ShortV and ShortGPT: rankings of layers as their authors' code gives them, naive twins, and exactness of both."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
from asking import cases
from golden_files import drawn
from plain import SEEDS, cosine

import prunekit
from prunekit import LayerAction, loading
from prunekit.families import shape_of
from prunekit.strategy.artefact import Artefact
from prunekit.testing.tiny import tiny_inputs, tiny_llava
from prunekit.training.calibrate import calibrate, stage_of
from prunekit.training.data import source
from prunekit.verify.equivalence import assert_equivalent

# Of LLaVA-1.5-7B, by the authors' README, least contributing first.
PUBLISHED = (31, 29, 30, 28, 0, 26, 27, 25, 24, 22, 23, 21, 2, 3, 20, 18, 17, 12, 19)


@pytest.fixture(scope="module")
def shape():
    return shape_of(tiny_llava())


class Told:
    """A prompt of a calibration whose answers are listed. frozen: logits by layer; what they stand for is checked."""

    def __init__(self, states=(), full=(), frozen=()):
        self._states, self._full, self._frozen = states, full, frozen

    def states(self):
        return self._states

    def logits(self, stages=(), wrapper=None):
        if not stages:
            return torch.tensor(self._full)
        (stage,) = stages
        (layer,) = stage["layers"]
        assert stage == {"use": "freeze_layers", "layers": [layer]}
        return torch.tensor(self._frozen[layer])


def written(folder, use, shape, **result):
    """The artefact of a calibration with this result."""
    about = {"id": "tiny", "family": shape.family, "layers": shape.layers, "hidden": shape.hidden}
    path = folder / f"{use}.json"
    Artefact(prunekit.__version__, use, about, {"name": "none"}, result).write(path)
    return str(path)


def asked(use, prompts, shape, **options):
    """What the strategy's `calibrate` measures."""
    stage = prunekit.load({"stages": [{"use": use, **options}]}).stages[0]
    return stage.hook.calibrate(prompts=prompts, shape=shape)


def planned(use, shape, **options):
    """Action by layer."""
    return dict(prunekit.load({"stages": [{"use": use, **options}]}).bind(shape).plan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", cases("shortgpt_bi", 2))
def test_shortgpt_as_its_authors(case, dtype, shape, tmp_path):
    """Every row of the batch is a prompt; the mean over tokens times their number is the authors' sum."""
    steps, params = list(drawn(case, torch.float32).values()), case["params"]
    states = [steps[0]]
    for step in steps[1:]:
        states.append(states[-1] + step)
    prompts = [Told([one[row].to(dtype) for one in states]) for row in range(params["batch"])]
    model = replace(shape, layers=params["layers"])
    influence = asked("shortgpt", prompts, model, drop=1)["influence"]
    tokens = params["batch"] * params["tokens"]
    sums = [one * tokens for one in influence]
    wanted = case["expected"]
    assert sums == pytest.approx(wanted["block_influence_sum"], rel=2e-5, abs=2e-5)
    order = sorted(range(len(influence)), key=influence.__getitem__)
    assert order[: params["remove"]] == wanted["removed_lowest_first"]
    path = written(tmp_path, "shortgpt", model, influence=influence)
    plan = planned("shortgpt", model, drop=params["remove"], calibration=path)
    assert plan == dict.fromkeys(sorted(wanted["removed_lowest_first"]), LayerAction.SKIP)


@pytest.mark.parametrize("seed", SEEDS)
def test_shortgpt_as_loops(seed, shape, tmp_path):
    """Ties, one prompt and several, one layer dropped up to all but one."""
    draw = random.Random(seed)
    model, prompts = replace(shape, layers=draw.randint(2, 6)), []
    total, tokens = [0.0] * model.layers, 0
    for _ in range(draw.randint(1, 3)):
        number = draw.randint(1, 4)
        states = [[[draw.choice((-1.0, 0.5, 2.0)) for _ in range(4)] for _ in range(number)] for _ in range(1)]
        for _ in range(model.layers):
            same = draw.random() < 0.3
            states.append(states[-1] if same else [[x + draw.choice((0.0, 1.0)) for x in one] for one in states[-1]])
        prompts.append(Told([torch.tensor(one) for one in states]))
        tokens += number
        for layer in range(model.layers):
            total[layer] += sum(1 - cosine(x, y) for x, y in zip(states[layer], states[layer + 1], strict=True))
    influence = asked("shortgpt", prompts, model, drop=1)["influence"]
    assert influence == pytest.approx([one / tokens for one in total], abs=1e-12)
    drop = draw.randint(1, model.layers - 1)
    left, gone = {layer: round(one, 9) for layer, one in enumerate(influence)}, []
    path = written(tmp_path, "shortgpt", model, influence=list(left.values()))
    while len(gone) < drop:
        lowest = min(left.values())
        gone.append(max(layer for layer, one in left.items() if one == lowest))
        del left[gone[-1]]
    plan = planned("shortgpt", model, drop=drop, calibration=path)
    assert plan == dict.fromkeys(sorted(gone), LayerAction.SKIP)


@pytest.mark.parametrize("seed", SEEDS)
def test_shortv_as_loops(seed, shape, tmp_path):
    """The ranking by hand, layers that cannot be frozen left out of it; then the plan, ties among the layers."""
    draw = random.Random(seed)
    layers = draw.randint(2, 6)
    recurrent = tuple(layer for layer in range(layers) if seed % 3 == 0 and draw.random() < 0.3)[: layers - 1]
    model = replace(shape, layers=layers, recurrent=recurrent)
    prompts, wanted = [], dict.fromkeys((layer for layer in range(layers) if layer not in recurrent), 0.0)
    many = draw.randint(1, 4)
    for _ in range(many):
        full = [draw.choice((-2.0, 0.0, 1.0)) for _ in range(5)]
        frozen = [
            list(full) if draw.random() < 0.3 else [draw.choice((-2.0, 0.0, 1.0)) for _ in full] for _ in range(layers)
        ]
        prompts.append(Told(full=full, frozen=frozen))
        for layer in wanted:
            whole, mine = sum(map(math.exp, full)), sum(map(math.exp, frozen[layer]))
            for x, y in zip(frozen[layer], full, strict=True):
                wanted[layer] += math.exp(x) / mine * (x - math.log(mine) - y + math.log(whole)) / many
    found = asked("shortv", prompts, model)["divergence"]
    assert found == pytest.approx({str(layer): one for layer, one in wanted.items()}, abs=1e-12)
    left, gone = {layer: round(one, 9) for layer, one in wanted.items()}, []
    path = written(tmp_path, "shortv", model, divergence={str(layer): one for layer, one in left.items()})
    freeze = draw.randint(1, len(left))
    while len(gone) < freeze:
        lowest = min(left.values())
        gone.append(max(layer for layer, one in left.items() if one == lowest))
        del left[gone[-1]]
    plan = planned("shortv", model, freeze=freeze, calibration=path)
    assert plan == dict.fromkeys(sorted(gone), LayerAction.FREEZE)


def test_the_published_ranking_freezes_the_published_layers(shape, tmp_path):
    """19 of 32 layers and 24 of 40 by default; no visual token is dropped."""
    large = replace(shape, layers=32)
    rest = [layer for layer in range(32) if layer not in PUBLISHED]
    ranking = {str(layer): float(place) for place, layer in enumerate((*PUBLISHED, *rest))}
    path = written(tmp_path, "shortv", large, divergence=ranking)
    plan = planned("shortv", large, calibration=path)
    assert sorted(plan) == sorted(PUBLISHED) and set(plan.values()) == {LayerAction.FREEZE}
    assert plan == planned("freeze_layers", large, layers=list(PUBLISHED))
    larger = replace(shape, layers=40)
    path = written(tmp_path, "shortv", larger, divergence={str(layer): float(layer) for layer in range(40)})
    assert len(planned("shortv", larger, calibration=path)) == 24


def test_a_calibration_of_the_bundled_model_freezes_what_shows_least():
    model, processor = loading.load("micro")
    stage, data = stage_of(prunekit.load({"stages": [{"use": "shortv"}]}), None), source("micro-scenes")
    found = calibrate(stage, model, processor, data, 2, model_id="micro", name="micro-scenes").result["divergence"]
    assert list(found) == [str(layer) for layer in range(8)] and all(one > -1e-9 for one in found.values())
    assert max(found.values()) > 1e-4


@pytest.mark.parametrize(
    ("use", "options", "result"),
    [
        ("shortv", {"freeze": 3}, {"divergence": {str(layer): float(layer % 4) for layer in range(6)}}),
        ("shortgpt", {"drop": 2}, {"influence": [float(layer % 4) for layer in range(6)]}),
        ("shortgpt", {"drop": 2, "phase": "prefill"}, {"influence": [float(layer % 4) for layer in range(6)]}),
    ],
    ids=["shortv", "shortgpt", "shortgpt-gen"],
)
def test_they_are_exact_before_and_behind_a_cut(use, options, result, shape, tmp_path):
    """ShortGPT by generation: the prefill leaves layers out and fills their KV, and decoding runs them."""
    assert shape.layers == 6
    stage = {"use": use, **options, "calibration": written(tmp_path, use, shape, **result)}
    stages = [{"use": "divprune", "keep": 0.7}, {"use": "fastv", "at": 3, "keep": 0.3}, stage]
    found = assert_equivalent(tiny_llava(), {"stages": stages}, tiny_inputs(images=(1, 2), text=(9, 5)), steps=3)
    held = [set(row) for row in zip(*found.report.kv_tokens, strict=True)]
    skipped = use == "shortgpt" and "phase" not in options
    assert (min(map(min, held)) == 0) == skipped


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"freeze": 0}, "freeze: freeze at least one layer"),
            ({"freeze": 7}, "freeze: 7 layers are more than the 6 that can be frozen"),
            ({"calibration": None}, "calibration: is missing; `prunekit calibrate` writes one"),
            ({"calibration": "none.json"}, "calibration: cannot read"),
        ],
    )
    def test_options(self, options, message, shape, tmp_path):
        path = written(tmp_path, "shortv", shape, divergence={str(layer): 0.0 for layer in range(6)})
        with pytest.raises(prunekit.SpecError, match=message):
            planned("shortv", shape, **{"calibration": path, **options})

    def test_the_calibration_of_another(self, shape, tmp_path):
        path = written(tmp_path, "shortv", shape, divergence={"0": 0.0})
        with pytest.raises(prunekit.SpecError, match=r"calibration: it is of a model with .*layers 6"):
            planned("shortv", replace(shape, layers=7), calibration=path, freeze=1)
        other = written(tmp_path, "shortgpt", shape, influence=[0.0] * 6)
        with pytest.raises(prunekit.SpecError, match="is a calibration of 'shortgpt'"):
            planned("shortv", shape, calibration=other)
