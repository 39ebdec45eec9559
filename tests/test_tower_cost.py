"""FLOPs of vision tower and projector, against FlopCounterMode on the stock parts of the model, dense and cut.

Eager attention, whose products the counter sees on every device.
"""

from __future__ import annotations

import warnings
from functools import cache

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import prunekit
from prunekit import Sites, families, hookimpl, plugins, strategy
from prunekit.cost import TowerWork, tower_flops
from prunekit.pipeline.forecast import forecast
from prunekit.strategy.decisions import TowerParams
from prunekit.testing.tiny import tiny_inputs, tiny_llava
from prunekit.testing.tiny_families import row_of, takes_video, tiny_batch, tiny_model, tiny_names
from prunekit.verify.strategies import DRAWN, with_own


@strategy(sites=Sites(tower=True, pixels=True), keep="refused")
class Even:
    """Keeps even columns, or even rows: of crops and frames that are alike equally many, so that none is filled up."""

    axis: int = 2

    @hookimpl
    def select_tokens(self, coords, valid):
        return valid & (coords[..., self.axis] % 2 == 0)


REGISTRY = with_own(plugins.registry())
REGISTRY.signed("tests", "tests").strategy("even", f"{__name__}:Even")
EVEN, ROWS = {"use": "even"}, {"use": "even", "axis": 1}
PIPELINES = {
    "dense": [{"use": "dense"}],
    "decoder": [{"use": DRAWN, "at": "encoder", "keep": 0.5}],
    "block": [{**EVEN, "at": "vision.0"}],
    "inside": [{**EVEN, "at": "vision.1.mid"}],
    "twice": [{**EVEN, "at": "vision.0.mid"}, {**ROWS, "at": "vision.1"}],
    "pixels": [{**EVEN, "at": "pixels"}],
    "pixels and blocks": [{**EVEN, "at": "pixels"}, {**ROWS, "at": "vision.1.mid"}],
    "smaller": [{"use": "downsample", "scale": 0.6}, {**EVEN, "at": "vision.0"}],
}
TOWERS = {name: families.find(tiny_model(name)).tower for name in tiny_names()}
ANY_SIZE = [name for name, tower in TOWERS.items() if tower is not None and tower.shape().images == "any"]


@cache
def model_of(name):
    return tiny_llava("eager", tower="pixtral") if name == "llava-pixtral" else tiny_model(name, "eager")


def batch_of(name, kind):
    return tiny_inputs(sizes=True) if name == "llava-pixtral" else tiny_batch(model_of(name), ((kind,),))


def piped(stages):
    return prunekit.load({"name": "cost", "stages": stages}, registry=REGISTRY)


def counted(model, pipeline, batch):
    """What the counter saw outside of the decoder and the head, and the report."""
    with torch.no_grad(), prunekit.apply(model, pipeline) as run, FlopCounterMode(display=False) as counter:
        model(**batch)
    by_module = counter.get_flop_counts()

    def of(*ends):
        return sum(sum(ops.values()) for name, ops in by_module.items() if name.endswith(ends) and "." in name)

    return counter.get_total_flops() - of(".language_model", ".text_model") - of(".lm_head"), run.report


CASES = [(name, "image") for name in (*tiny_names(), "llava-pixtral")]
CASES += [(name, "video") for name in tiny_names() if takes_video(name)]
OFTEN = ("llava", "llava_next", "llava_onevision", "qwen2_5_vl", "mistral3")


@pytest.mark.parametrize(("name", "kind"), [
    pytest.param(name, kind, marks=() if name in OFTEN else pytest.mark.slow) for name, kind in CASES
])  # fmt: skip
def test_every_figure_is_what_the_counter_counts(name, kind):
    model, batch = model_of(name), batch_of(name, kind)
    dense, _ = counted(model, piped(PIPELINES["dense"]), batch)
    for label, stages in PIPELINES.items():
        if "pixels" in str(stages) and name not in (*ANY_SIZE, "llava-pixtral"):
            continue
        found, report = counted(model, piped(stages), batch)
        cost = report.cost
        assert (cost.tower_flops, cost.dense_tower_flops) == ((found,), (dense,)), label
        fewer = label not in ("dense", "decoder")
        assert (found < dense) is fewer, label
        whole = (cost.prefill_flops[0] + found) / (cost.dense_prefill_flops[0] + dense)
        assert cost.whole_flops_fraction == pytest.approx(whole)


@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl", "mistral3"])
def test_a_sample_costs_what_it_costs_alone(name):
    """Also where images share a sequence; a row without an image costs nothing."""
    model = model_of(name)
    rows = (("image",), ("image", "image"), ())
    pipeline = piped(PIPELINES["inside"])
    with torch.no_grad(), warnings.catch_warnings(), prunekit.apply(model, pipeline) as run:
        warnings.simplefilter("ignore", prunekit.PrunekitWarning)
        batch = tiny_batch(model, rows)
        model(**batch)
        together = run.report.cost
        assert together.tower_flops[2] == together.dense_tower_flops[2] == 0
        for row in range(2):
            model(**row_of(batch, row))
            assert run.report.cost.tower_flops == (together.tower_flops[row],)
            assert run.report.cost.dense_tower_flops == (together.dense_tower_flops[row],)


BUDGETS = {
    "dense": [{"use": "dense"}],
    "decoder": [{"use": DRAWN, "at": "encoder", "keep": 0.5}],
    "block": [{"use": DRAWN, "at": "vision.0", "keep": 0.5}],
    "twice": [{"use": DRAWN, "at": ["vision.0.mid", "vision.1"], "keep": [0.7, 0.3]}],
}


@pytest.mark.parametrize("label", BUDGETS)
@pytest.mark.parametrize("name", ["llava", "paligemma", "gemma3", "vipllava"])
def test_a_forecast_says_what_the_report_says(name, label):
    model = model_of(name)
    batch = tiny_batch(model, (("image",),))
    pipeline, shape = piped(BUDGETS[label]), families.find(model).shape()
    found = forecast(pipeline.bind(shape), batch["input_ids"].shape[1] - shape.visual_tokens)
    with torch.no_grad(), prunekit.apply(model, pipeline) as run:
        model(**batch)
    assert found.whole == pytest.approx((run.report.cost.whole_flops_fraction,) * 2)


def test_a_forecast_where_a_stage_decides_by_itself_holds_bounds():
    model = model_of("llava")
    pipeline, shape = piped([{**EVEN, "at": "vision.0"}]), families.find(model).shape()
    found = forecast(pipeline.bind(shape), 9)
    with torch.no_grad(), prunekit.apply(model, pipeline) as run:
        model(**tiny_batch(model, (("image",),)))
    assert found.whole[0] < run.report.cost.whole_flops_fraction < found.whole[1] == 1


def test_features_from_outside_have_no_known_cost():
    model, batch = model_of("qwen2_5_vl"), batch_of("qwen2_5_vl", "image")
    with torch.no_grad():
        encoded = model.model.get_image_features(batch["pixel_values"], batch["image_grid_thw"], return_dict=True)
    given = {key: value for key, value in batch.items() if key != "pixel_values"}
    with torch.no_grad(), prunekit.apply(model, piped(PIPELINES["decoder"])) as run:
        model(**given, mm_encoder_outputs={"image": encoded})
    cost = run.report.cost
    assert cost.tower_flops is cost.dense_tower_flops is cost.whole_flops_fraction is None
    assert "whole-prefill" not in str(run.report) and run.report.to_json()["cost"]["whole_flops_fraction"] is None


def test_by_hand():
    """Ten patches, of which six come to the second block and four to its MLP."""
    params = TowerParams(patch=7, attention=40, mlp=60, width=5, projector=11, mergers=(13, 17), pool=100)
    work = TowerWork(10, ((10, 10 * 10, 10), (6, 2 * 3 * 3, 4)), projected=4, merged=(2, 3), pools=1, pooled=10)
    blocks = 2 * 40 * 16 + 4 * 5 * (100 + 18) + 2 * 60 * 14
    pool = 2 * (100 - 50) + 10 * (4 * 25 + 4 * 5)
    assert tower_flops(params, work) == 2 * 7 * 10 + blocks + pool + 2 * 11 * 4 + 2 * 13 * 2 + 2 * 17 * 3
