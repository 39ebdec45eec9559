"""What `prunekit show` promises is what a run then reports, layer by layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import prunekit
from prunekit import LayerAction, LayerPlan, Route, Sites, cost, families, hookimpl, plugins, strategy
from prunekit.pipeline import build
from prunekit.pipeline.forecast import forecast
from prunekit.testing.tiny import tiny_inputs, tiny_llava

INPUTS = tiny_inputs(images=(1,), text=(10,))
TEXT = INPUTS["input_ids"].shape[1] - 16


@strategy(sites=Sites(end=True))
class Early:
    """Keeps the first tokens, anywhere."""

    @hookimpl
    def score_tokens(self, valid: torch.Tensor) -> torch.Tensor:
        return -torch.arange(valid.shape[1]).expand(valid.shape).float()


@strategy()
class Late:
    """Routes: prefers late tokens and early layers."""

    @hookimpl
    def route(self, embeds: torch.Tensor, shape: prunekit.ModelShape) -> Route:
        rows, length, _ = embeds.shape
        layers = -torch.arange(shape.layers).expand(rows, -1).float()
        return Route(torch.arange(length).expand(rows, -1).float(), layers)


@strategy(keep_layers="refused", routes=("layers",))
class Whole:
    """Plans by itself: leaves out layer 1."""

    @hookimpl
    def route(self, embeds: torch.Tensor) -> Route:
        return Route(plans=[LayerPlan({1: LayerAction.SKIP})] * len(embeds))


@strategy()
class Priced(Early):
    """Says what it costs."""

    each: int = 1

    @hookimpl
    def flops(self, shape: prunekit.ModelShape, text: int, visual: int) -> int:
        return self.each * (text + visual)


@strategy()
class PricedRouter(Late):
    """So does this router."""

    @hookimpl
    def flops(self, shape: prunekit.ModelShape, text: int, visual: int) -> int:
        return 1000 * (text + visual)


@strategy(keep="refused", sites=Sites(end=True))
class Half:
    """Decides by itself: half of what reaches it."""

    @hookimpl
    def select_tokens(self, valid: torch.Tensor) -> torch.Tensor:
        return valid & (torch.arange(valid.shape[1]) % 2 == 0)


class Plugin:
    @hookimpl
    def prunekit_register(self, registry: Any) -> None:
        for cls in (Early, Late, Whole, Priced, PricedRouter, Half):
            registry.strategy(cls.__name__.lower(), f"{__name__}:{cls.__name__}")


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    plugins.register(Plugin(), "forecast")
    yield
    plugins.unregister("forecast")


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llava()


EXACT: dict[str, list[dict[str, Any]]] = {
    "dense": [{"use": "dense"}],
    "before, inside and after a layer": [
        {"use": "early", "at": ["encoder", "1.mid", "2.after", 4], "keep": [0.8, 0.6, 0.4, 0.2]},
    ],
    "two cuts inside a layer": [
        {"use": "early", "at": "2.mid", "keep": 0.5}, {"use": "stride", "at": "2.mid", "keep": 0.25},
    ],
    "of what is left": [{"use": "early", "at": [1, 2], "keep": 0.5, "keep_of": "current"}],
    "everything": [{"use": "fastv", "keep_tokens": 7}, {"use": "vtw", "at": 4}],
    "after the prefill": [{"use": "early", "at": [2, "prefill_end"], "keep": [0.5, 0.25]}],
    "layers left out": [{"use": "early", "keep": 0.5}, {"use": "skip_layers", "layers": [1, 4]}],
    "parts of layers": [
        {"use": "skip_layers", "layers": [1], "what": "mlp"},
        {"use": "skip_layers", "layers": [3], "what": "attention"},
    ],
    "one phase": [
        {"use": "skip_layers", "layers": [1], "phase": "prefill", "fill_kv": True},
        {"use": "skip_layers", "layers": [3], "phase": "decode"},
    ],
    "frozen": [{"use": "freeze_layers", "layers": [1, 2]}, {"use": "early", "at": 2, "keep": 0.5}],
    "tokens of a router": [{"use": "stride", "keep": 0.5}, {"use": "late", "at": [2, 4], "keep": [0.25, 0.125]}],
}  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
def test_promised_and_reported(model: Any, name: str) -> None:
    built = build.build({"stages": EXACT[name]})
    found = forecast(built.bind(families.find(model).shape()), TEXT)
    with prunekit.apply(model, built) as run:
        model.generate(**INPUTS, max_new_tokens=2, do_sample=False)
    report = run.report
    assert found is not None and report is not None
    assert not found.at_most
    assert found.layer_tokens == report.layer_tokens[0]
    assert found.mlp_tokens == report.mlp_tokens[0]
    assert found.kv_tokens == report.kv_tokens[0]
    assert found.flops == pytest.approx((report.cost.flops_fraction - found.decisions,) * 2)
    assert found.kv == pytest.approx((report.cost.kv_fraction,) * 2)


@pytest.mark.parametrize(
    "stages",
    [
        [{"use": "late", "keep_layers": 4}],
        [{"use": "late", "keep_layers": 0.5, "keep": 0.25, "at": 2}],
        [{"use": "late", "keep_layers": 3}, {"use": "fastv", "at": 4, "keep": 0.25}],
        [{"use": "skip_layers", "layers": [2]}, {"use": "late", "keep_layers": 4, "keep": 0.5}],
        [{"use": "whole"}, {"use": "early", "at": "3.mid", "keep": 0.25}],
    ],
)
def test_what_a_router_does_is_within_the_promised_range(model: Any, stages: list[dict[str, Any]]) -> None:
    built = build.build({"stages": stages})
    found = forecast(built.bind(families.find(model).shape()), TEXT)
    with prunekit.apply(model, built) as run:
        model.generate(**INPUTS, max_new_tokens=2, do_sample=False)
    assert found is not None and run.report is not None
    layers = run.report.cost.flops_fraction - found.decisions
    assert found.flops[0] - 1e-9 <= layers <= found.flops[1] + 1e-9
    assert found.kv[0] - 1e-9 <= run.report.cost.kv_fraction <= found.kv[1] + 1e-9
    if built.stages[-1].use != "early":
        assert found.flops[0] < 1


@pytest.mark.parametrize(
    "stages",
    [
        [{"use": "half", "at": 2}],
        [{"use": "early", "at": 1, "keep": 0.75}, {"use": "half", "at": "2.mid"}, {"use": "late", "keep_layers": 4}],
        [{"use": "half", "at": ["encoder", "prefill_end"]}, {"use": "skip_layers", "layers": [4]}],
    ],
    ids=str,
)
def test_what_a_stage_decides_by_itself_is_within_the_promised_range(model: Any, stages: list[dict[str, Any]]) -> None:
    """From leaving nothing to leaving everything; token counts are then the most."""
    built = build.build({"stages": stages})
    promised = forecast(built.bind(families.find(model).shape()), TEXT)
    with prunekit.apply(model, built) as run:
        model.generate(**INPUTS, max_new_tokens=2, do_sample=False)
    assert promised is not None and run.report is not None
    assert promised.at_most
    assert promised.flops[0] < run.report.cost.flops_fraction < promised.flops[1]
    assert promised.kv[0] < run.report.cost.kv_fraction < promised.kv[1]
    for most, real in (
        (promised.layer_tokens, run.report.layer_tokens[0]), (promised.mlp_tokens, run.report.mlp_tokens[0]),
    ):  # fmt: skip
        assert all(a >= b for a, b in zip(most, real, strict=True))


def test_what_decisions_cost_by_their_own_account(model: Any) -> None:
    """A token stage at each of its cuts, with what reaches it; a router once, behind those at the decoder input."""
    shape = families.find(model).shape()
    stages = [{"use": "priced", "at": ["encoder", 2], "keep": 0.5}, {"use": "pricedrouter", "at": 3, "keep": 0.25}]
    found = forecast(build.build({"stages": stages}).bind(shape), TEXT)
    dense = cost.prefill_flops(shape, [16 + TEXT] * shape.layers)
    assert found is not None
    assert found.decisions == pytest.approx(((TEXT + 16) + (TEXT + 8) + 1000 * (TEXT + 8)) / dense)


def test_two_stages_of_one_strategy_at_one_site_cost_what_each_says(model: Any) -> None:
    """Stages are told apart by their number in the pipeline: equal names at equal sites may have other options."""
    shape = families.find(model).shape()
    keys = {"use": "priced", "at": "encoder"}
    built = build.build({"stages": [{**keys, "each": 1, "keep": 0.5}, {**keys, "each": 1000, "keep": 0.25}]})
    with prunekit.apply(model, built) as run:
        model(**tiny_inputs((1,), TEXT - 1))
    promised = forecast(built.bind(shape), TEXT)
    assert promised is not None and run.report is not None
    assert run.report.cost.decision_flops == ((TEXT + 16) + 1000 * (TEXT + 8),)
    assert [event.index for event in run.report.events] == [0, 1]
    dense = cost.prefill_flops(shape, [16 + TEXT] * shape.layers)
    assert promised.decisions == pytest.approx(run.report.cost.decision_flops[0] / dense)


def test_nothing_is_promised_where_tokens_depend_on_the_picture(model: Any) -> None:
    shape = dataclasses.replace(families.find(model).shape(), visual_tokens=None)
    assert forecast(build.build({"stages": [{"use": "dense"}]}).bind(shape), TEXT) is None
