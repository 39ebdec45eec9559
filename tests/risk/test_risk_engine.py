"""Samples of one batch on rungs of their own: each equals a fixed budget, alone and beside others."""

from __future__ import annotations

import math

import artefacts
import pytest
import torch
from artefacts import FASTV, LADDER, PAR, ROUTED

import prunekit
from prunekit import PrunekitWarning, Sites, SpecError, hookimpl, plugins, strategy
from prunekit.errors import PluginError
from prunekit.pipeline.forecast import forecast
from prunekit.serving.advice import of_stage
from prunekit.testing import assert_equivalent
from prunekit.testing.tiny import row_of, tiny_inputs

HARMS = {}
ASKED = []


@strategy()
class Foretold:
    """Scores by the number of the token, and predicts what the test wants by how many tokens there are."""

    @hookimpl
    def score_tokens(self, index):
        return index.float()

    @hookimpl
    def predict_harm(self, scores, keep, layer_scores, state):
        ASKED.append((scores, keep, layer_scores, state))
        return torch.tensor(HARMS[len(scores)])


@strategy(sites=Sites(tower=True))
class Early(Foretold):
    pass


@strategy()
class ByCount(Foretold):
    @hookimpl
    def score_tokens(self, index, count):
        return index * count[0]


@strategy(keep_layers="refused")
class PlansItself:
    @hookimpl
    def route(self, embeds):
        raise NotImplementedError


class Plugin:
    @hookimpl
    def prunekit_register(self, registry):
        registry.strategy("plans-itself", f"{__name__}:PlansItself")
        registry.strategy("early", f"{__name__}:Early")
        registry.strategy("by-count", f"{__name__}:ByCount")
        registry.strategy("foretold", f"{__name__}:Foretold")


@pytest.fixture(autouse=True, scope="module")
def registered():
    plugins.register(Plugin(), "foretold")
    yield
    plugins.unregister("foretold")


INPUTS = tiny_inputs((1, 2, 1, 3), (9, 4, 12, 7))
LATER = {**PAR, "route_at": 1}
KINDS = pytest.mark.parametrize(
    ("stage", "ladder"), [(PAR, ROUTED), (LATER, ROUTED), (FASTV, LADDER)], ids=["router", "later", "tokens"]
)


def run(model, pipeline, inputs, steps=3):
    with prunekit.apply(model, pipeline) as attached:
        output = model.generate(
            **inputs, max_new_tokens=steps, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    return torch.stack(output.logits, 1), attached.report


def between(folder, model, shape, stage, ladder):
    """A pipeline whose limit lies in the middle of the harms of `INPUTS`, so that samples take several rungs."""
    _, report = run(model, artefacts.calibrated(folder, stage, ladder, shape, 0.5), INPUTS, 1)
    harms = sorted(harm for row in report.harms for harm in row)
    lower, upper = harms[len(harms) // 2 - 1 : len(harms) // 2 + 1]
    return artefacts.calibrated(folder, stage, ladder, shape, (lower + upper) / 2)


@KINDS
def test_a_row_of_a_batch_is_the_row_alone_and_a_fixed_budget(tmp_path, model, shape, stage, ladder):
    pipeline = between(tmp_path, model, shape, stage, ladder)
    logits, report = run(model, pipeline, INPUTS)
    assert len(set(report.rungs)) > 1, "the test is about rows on different rungs"
    fixed = pipeline.rungs()
    for row, rung in enumerate(report.rungs):
        alone, own = run(model, pipeline, row_of(INPUTS, row))
        assert own.rungs == (rung,) and own.harms[0] == pytest.approx(report.harms[row], abs=1e-12)
        assert torch.allclose(alone[0], logits[row], atol=1e-9)
        at_rung, of_rung = run(model, fixed[rung], row_of(INPUTS, row))
        assert torch.allclose(at_rung[0], logits[row], atol=1e-9) and of_rung.rungs == ()
        assert of_rung.plans == own.plans == (report.plans[row],)
        assert of_rung.kept_tokens == own.kept_tokens == (report.kept_tokens[row],)
        assert of_rung.cost == own.cost


@KINDS
def test_it_equals_the_masked_reference(tmp_path, model, shape, stage, ladder):
    pipeline = between(tmp_path, model, shape, stage, ladder)
    done = assert_equivalent(model, pipeline, INPUTS, steps=2)
    assert len(set(done.report.rungs)) > 1


@KINDS
def test_harms_rise_along_the_ladder_and_the_last_below_the_limit_is_taken(tmp_path, model, shape, stage, ladder):
    limit = 0.45
    _, report = run(model, artefacts.calibrated(tmp_path, stage, ladder, shape, limit), INPUTS, 1)
    for harms, rung in zip(report.harms, report.rungs, strict=True):
        assert list(harms) == sorted(harms) and len(harms) == len(ladder)
        assert all(harm < limit for harm in harms[:rung]) and all(harm >= limit for harm in harms[rung:])


@KINDS
@pytest.mark.parametrize(("limit", "rung"), [(0.0, 0), (math.inf, 3)], ids=["none", "all"])
def test_the_ends_of_the_ladder(tmp_path, model, shape, stage, ladder, limit, rung):
    logits, report = run(model, artefacts.calibrated(tmp_path, stage, ladder, shape, limit or 1e-300), INPUTS)
    assert report.rungs == (rung,) * 4
    if rung == 0:
        dense = model.generate(
            **INPUTS, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        assert torch.equal(torch.stack(dense.logits, 1), logits)
        assert report.kept_tokens == report.visual_tokens and not report.plans[0].layers


def test_shares_by_hand(tmp_path, model, shape):
    """The default: what leaves of the scores above the lowest, of tokens and layers together."""
    _, report = run(model, artefacts.calibrated(tmp_path, FASTV, LADDER, shape, 0.5), row_of(INPUTS, 0), 1)
    with prunekit.apply(model, pipeline := artefacts.pipeline(FASTV, LADDER).rungs()[0], trace=True) as attached:
        model(**row_of(INPUTS, 0))
    (sample,) = attached.trace.samples
    scores = sorted(sample.stages[0].scores.values(), reverse=True)
    above = [score - scores[-1] for score in scores]
    for harm, count in zip(report.harms[0], (12, 8, 4), strict=True):
        assert harm == pytest.approx(1 - sum(above[:count]) / sum(above), abs=1e-12)
    assert pipeline.name == "risky-rung-0"


def test_a_strategy_predicts_for_itself(tmp_path, model, shape):
    ASKED.clear()
    HARMS.update({16: [0.1, 3.0, 2.0], 32: [0.0, 0.0, 0.0], 48: [5.0, 6.0, 7.0]})
    stage = {"use": "foretold", "at": 1}
    _, report = run(model, artefacts.calibrated(tmp_path, stage, LADDER, shape, 2.5), INPUTS, 1)
    assert report.rungs == (1, 3, 1, 0)
    assert report.harms[0] == pytest.approx((0.1, 3.0, 3.0)), "a rung does at least the harm of those before it"
    assert report.kept_tokens == (12, 8, 12, 48)
    scores, keep, layers, state = ASKED[1]
    assert scores.tolist() == list(range(32)) and keep.sum(1).tolist() == [24, 16, 8] and layers is None
    assert state == {}


@pytest.mark.parametrize(
    ("harms", "said"),
    [
        ([0.1, 0.2], r"predict_harm must return a tensor of shape \(3,\), not \(2,\)"),
        ([0.1, -0.2, 0.3], "predict_harm must return finite numbers of at least 0, not"),
        ([0.1, math.nan, 0.3], "predict_harm must return finite numbers of at least 0, not"),
    ],
)
def test_predictions_that_are_none(tmp_path, model, shape, harms, said):
    HARMS.update(dict.fromkeys((16, 32, 48), harms))
    with pytest.raises(PluginError, match=said):
        run(model, artefacts.calibrated(tmp_path, {"use": "foretold", "at": 1}, LADDER, shape, 0.5), INPUTS, 1)


@KINDS
def test_a_sample_without_image_runs_dense(tmp_path, model, shape, stage, ladder):
    inputs = tiny_inputs((1, 0), (9, 9))
    _, report = run(model, artefacts.calibrated(tmp_path, stage, ladder, shape, math.inf), inputs, 1)
    assert report.rungs == (3, 0) and report.harms[1] == () and not report.plans[1].layers


@KINDS
def test_forecasts_are_bounds(tmp_path, model, shape, stage, ladder):
    bound = artefacts.calibrated(tmp_path, stage, ladder, shape, 0.5).bind(shape)
    told = forecast(bound, 10)
    low, high = told.flops
    assert told.at_most and low < high == 1.0
    for rung in bound.ladder.rungs:
        one = forecast(rung, 10)
        assert low <= one.flops[0] and one.flops[1] <= high and told.kv[0] <= one.kv[0] <= told.kv[1]
    assert forecast(bound.ladder.rungs[-1], 10).flops[0] == low


def test_no_engine_serves_what_each_sample_decides(tmp_path, shape):
    bound = artefacts.calibrated(tmp_path, {"use": "foretold", "at": "encoder"}, LADDER, shape, 0.5).bind(shape)
    told = of_stage(bound.stages[0], bound)
    assert told.way == "no" and "how many tokens stay depends on what the image shows" in told.why


def test_what_certifies_nothing_runs_dense_and_says_so(tmp_path, model, shape):
    path = tmp_path / "risk.json"
    made = artefacts.pipeline(FASTV, LADDER)
    artefacts.artefact(made, shape, [0.3] * 20).write(path)
    strict = artefacts.pipeline(FASTV, LADDER, risk=0.02, confidence=0.9, calibration=str(path))
    said = r"no pruning is certified at a risk of 0\.02 with confidence 0\.9 by its 20 .*needs at least 114.*runs dense"
    with pytest.warns(PrunekitWarning, match=said):
        _, report = run(model, strict, INPUTS, 1)
    assert report.rungs == (0,) * 4


def test_several_cuts_of_one_stage_take_the_rung_of_the_first(tmp_path, model, shape):
    stage, ladder = {"use": "fastv", "at": [1, 3]}, [{"keep": [0.75, 0.5]}, {"keep": [0.5, 0.25]}]
    pipeline = between(tmp_path, model, shape, stage, ladder)
    done = assert_equivalent(model, pipeline, INPUTS, steps=2).report
    for event, wanted in zip(done.events, ((1, 0.75, 0.5), (1, 0.5, 0.25)), strict=True):
        for row, visual in enumerate(done.visual_tokens):
            assert len(event.kept[row]) == visual * wanted[done.rungs[row]] == event.asked[row]


def test_where_and_how_a_stage_cannot_score(shape):
    with pytest.raises(SpecError, match=r"stages\[0\]\.at: decides inside the vision tower, where each image is"):
        artefacts.pipeline({"use": "early", "at": "vision.1"}, LADDER).bind(shape)
    with pytest.raises(SpecError, match=r"stages\[0\]\.use: 'by-count' scores by how many tokens stay"):
        artefacts.pipeline({"use": "by-count"}, LADDER)
    with pytest.raises(SpecError, match=r"stages\[0\]\.use: 'plans-itself' decides by itself what stays, so that no"):
        artefacts.pipeline({"use": "plans-itself"}, LADDER)


def test_what_par_predicts():
    """The probabilities to keep that leave, over the number of tokens, and over that of layers."""
    from prunekit_strategies.par.strategy import Par

    scores, layers = torch.tensor([0.0, 2.0, -1.0, 0.5]), torch.tensor([1.0, -3.0])
    keep = torch.tensor([[True, True, False, True], [False, True, False, False]])
    runs = torch.tensor([[True, True], [True, False]])

    def probability(logit):
        return 1 / (1 + math.exp(-logit))

    first = probability(-1) / 4
    second = (probability(0) + probability(-1) + probability(0.5)) / 4
    told = Par(weights=None, seed=0).predict_harm(scores, keep, layers, runs)
    assert told.tolist() == pytest.approx([first, second + probability(-3) / 2])
    assert Par(weights=None, seed=0).predict_harm(scores, keep, None, None).tolist() == pytest.approx([first, second])
