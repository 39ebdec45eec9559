"""Observers are told what happened, get frozen data, and can hurt no run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from transformers import LlavaForConditionalGeneration

import prunekit
from prunekit import RunReport, StageEvent, hookimpl, plugins
from prunekit.testing.tiny import tiny_inputs, tiny_llava

STAGES = {"name": "two", "stages": [{"use": "stride", "keep": 0.5}, {"use": "fastv", "at": 3, "keep": 0.25}]}


class Listener:
    def __init__(self, fails: bool = False) -> None:
        self.events: list[StageEvent] = []
        self.reports: list[RunReport] = []
        self.fails = fails

    @hookimpl
    def prunekit_tokens_pruned(self, event: StageEvent) -> None:
        self.events.append(event)

    @hookimpl
    def prunekit_run_finished(self, report: RunReport) -> None:
        self.reports.append(report)
        if self.fails:
            raise RuntimeError("full disk")


@pytest.fixture
def listener(request: pytest.FixtureRequest) -> Iterator[Listener]:
    heard = Listener(fails=getattr(request, "param", False))
    plugins.register(heard, "listener")
    yield heard
    plugins.unregister("listener")


@torch.no_grad()
def logits(model: LlavaForConditionalGeneration) -> torch.Tensor:
    return model(**tiny_inputs()).logits



def test_a_wrapper_on_an_observer_hook_stands_around_its_own_alone(listener: Listener) -> None:
    class Timed:
        told: list[str] = []

        @hookimpl
        def prunekit_run_finished(self, report: RunReport) -> None:
            self.told.append("told")

    class Around(Timed):
        @hookimpl(wrapper=True)
        def prunekit_tokens_pruned(self, event: StageEvent) -> Iterator[None]:
            self.told.append(event.stage)
            yield
            raise RuntimeError("too late")

    plugins.register(Around(), "around")
    model, late = tiny_llava(), pytest.warns(prunekit.PrunekitWarning, match="'around' failed: RuntimeError: too late")
    try:
        with late, prunekit.apply(model, {"stages": [{"use": "stride", "keep": 0.5}]}):
            logits(model)
    finally:
        plugins.unregister("around")
    assert Timed.told == ["stride", "told"] and len(listener.reports) == len(listener.events) == 1


def test_one_event_a_stage_and_one_report_a_prompt(listener: Listener) -> None:
    model = tiny_llava()
    with prunekit.apply(model, STAGES) as run:
        for _ in range(2):
            logits(model)
    assert [event.stage for event in listener.events] == ["stride", "fastv"] * 2
    assert [len(event.kept[0]) for event in listener.events] == [8, 4] * 2
    assert len(listener.reports) == 2
    assert listener.reports[-1] == run.report
    with pytest.raises(dataclasses.FrozenInstanceError):
        listener.reports[0].pipeline = "other"  # type: ignore[misc]


@pytest.mark.parametrize("listener", [True], indirect=True)
def test_an_observer_that_raises_is_a_warning(listener: Listener) -> None:
    model = tiny_llava()
    expected = r"observer 'listener' failed: RuntimeError: full disk"
    with prunekit.apply(model, STAGES), pytest.warns(prunekit.PrunekitWarning, match=expected):
        assert torch.isfinite(logits(model)).all()
