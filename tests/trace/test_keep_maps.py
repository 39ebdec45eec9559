"""What a trace says of every visual token: against what the report says, and on grids worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import prunekit
from prunekit import ENCODER, Owners, Selection, Sites, plugins, strategy
from prunekit.errors import InputError
from prunekit.records import Trace
from prunekit.testing.tiny import TinyWords, tiny_inputs, tiny_llava
from prunekit.testing.tiny_families import takes_video, tiny_batch, tiny_model, tiny_names
from prunekit.trace.fates import Fate, StageMap

# One of each way in which images become visual tokens: crops, tiles, patches in a row, frames, padded images.
LAYOUTS = {"llava_next", "llava_onevision", "qwen2_5_vl", "internvl", "idefics3", "mistral3", "llava_next_video"}
FASTV = {"use": "fastv", "at": 2, "keep": 0.25}


def traced(model: Any, inputs: Any, *stages: dict[str, Any]) -> Trace:
    with prunekit.apply(model, {"name": "p", "stages": list(stages)}, processor=TinyWords(), trace=True) as run:
        model(**inputs)
    assert run.trace is not None
    return run.trace


def check_against_report(trace: Trace) -> None:
    """Each token that reached a stage has one fate there, and what is kept is what the report says."""
    for b, sample in enumerate(trace.samples):
        original = trace.report.visual_tokens[b]
        assert sorted(token for one in sample.inputs for token in one.ordinals) == list(range(original))
        alive = set(range(original))
        for stage, event in zip(sample.stages, trace.report.events, strict=True):
            assert set(stage.entered) == alive and len(stage.entered) == event.entered[b]
            assert stage.kept == event.kept[b]
            fates = [set(stage.kept), set(stage.merged), set(stage.dropped)]
            assert set.union(*fates) == alive and sum(map(len, fates)) == len(alive)
            assert all(set(into) <= set(stage.kept) and into for into in stage.merged.values())
            alive = set(stage.kept)


class TestCells:
    def test_kept_cells_are_those_of_the_report_on_the_known_grid(self) -> None:
        """The naive twin: 16 tokens an image, row by row on 4 x 4, counted through the images of a row of the batch."""
        trace = traced(tiny_llava(), tiny_inputs(images=(1, 2)), FASTV)
        (event,) = trace.report.events
        for b, sample in enumerate(trace.samples):
            cells = {(token // 16, token % 16 // 4, token % 4) for token in event.kept[b]}
            found = set()
            for number, one in enumerate(sample.inputs):
                assert one.kind == "image" and one.coords is not None and not one.joined
                for token, place in zip(one.ordinals, one.coords, strict=True):
                    assert place[3:5] == (4, 4)
                    found |= {(number, place[1], place[2])} if token in sample.stages[0].kept else set()
            assert found == cells and len(cells) == (4, 8)[b]
        check_against_report(trace)

    def test_a_row_of_a_batch_is_what_it_is_alone(self) -> None:
        from prunekit.testing.tiny import row_of

        model, inputs = tiny_llava(), tiny_inputs(images=(1, 2), text=(9, 5))
        together = traced(model, inputs, FASTV)
        for b in range(2):
            (alone,) = traced(model, row_of(inputs, b), FASTV).samples
            row = together.samples[b]
            assert row.inputs == alone.inputs
            assert (row.stages[0].kept, row.stages[0].dropped) == (alone.stages[0].kept, alone.stages[0].dropped)
            assert row.stages[0].scores == pytest.approx(alone.stages[0].scores)

    def test_the_kept_ones_have_the_highest_scores(self) -> None:
        for sample in traced(tiny_llava(), tiny_inputs(images=(1, 2)), FASTV).samples:
            (stage,) = sample.stages
            assert stage.scores is not None and set(stage.scores) == set(stage.entered)
            least = min(stage.scores[token] for token in stage.kept)
            assert all(stage.scores[token] <= least for token in stage.dropped)

    def test_a_row_without_images_has_no_cells(self) -> None:
        trace = traced(tiny_llava(), tiny_inputs(images=(1, 0)), FASTV)
        assert trace.samples[1].inputs == () and trace.samples[1].stages[0].entered == ()
        check_against_report(trace)

    @pytest.mark.parametrize(
        "family", [name if name in LAYOUTS else pytest.param(name, marks=pytest.mark.slow) for name in tiny_names()]
    )
    def test_every_family(self, family: str) -> None:
        model = tiny_model(family, layers=4)
        rows = [(("image",), ("image", "image"))] + [(("video",),)] * takes_video(family)
        for shown in rows:
            trace = traced(model, tiny_batch(model, shown), {"use": "random", "at": "encoder", "keep": 0.5})
            check_against_report(trace)
            assert all(one.coords or one.unknown for sample in trace.samples for one in sample.inputs)


class TestMerges:
    def test_pooling_by_hand(self) -> None:
        """Each square of 2 x 2 goes into one of its four tokens."""
        (sample,) = traced(tiny_llava(), tiny_inputs(), {"use": "pool", "keep": 0.25}).samples
        (stage,) = sample.stages
        assert len(stage.kept) == 4 and len(stage.merged) == 12 and stage.dropped == ()
        for token, into in stage.merged.items():
            assert [(one // 4 // 2, one % 4 // 2) for one in into] == [(token // 4 // 2, token % 4 // 2)]

    def test_in_the_tower_with_two_images(self) -> None:
        stages = {"use": "tome", "at": ["vision.0.mid", "vision.1.mid"], "keep": 0.5}
        trace = traced(tiny_llava(), tiny_inputs(images=(1, 2)), stages, FASTV)
        check_against_report(trace)
        first, second, last = trace.samples[1].stages
        assert len(first.merged) == len(second.merged) == 8 and last.scores is not None
        for token, into in {**first.merged, **second.merged}.items():
            assert {one // 16 for one in into} == {token // 16}, "a token joins one of its own image"

    def test_owners_and_a_matrix_say_the_same(self) -> None:
        """Tokens 0 and 1 stay; 2 joins 0, 3 joins 1, 4 goes nowhere, the others join 0."""
        found = []
        for matrix in (False, True):
            trace = traced(tiny_llava(), tiny_inputs(), {"use": "test-owners", "keep_tokens": 2, "matrix": matrix})
            check_against_report(trace)
            found.append((trace.samples[0].stages[0].merged, trace.samples[0].stages[0].dropped))
        assert found[0] == found[1] == ({2: (0,), 3: (1,), **dict.fromkeys(range(5, 16), (0,))}, (4,))

    @pytest.fixture(autouse=True)
    def _registered(self) -> Any:
        plugins.register(_Outsider(), "outsider")
        yield
        plugins.unregister("outsider")


@strategy(sites=Sites(default=ENCODER))
class OwnerTest:
    """A strategy of an outsider: it merges by owners, or by the same as a matrix."""

    matrix: bool = False

    @prunekit.hookimpl
    def select_tokens(self, valid: Any, count: Any) -> Selection:
        owner = torch.tensor([0, 1, 0, 1, -1, *[0] * 11]).expand(valid.shape)
        keep = torch.zeros_like(valid)
        keep[:, :2] = True
        if not self.matrix:
            return Selection(keep, Owners(owner))
        weights = torch.nn.functional.one_hot(owner.clamp_min(0), 16).double() * (owner >= 0)[..., None]
        return Selection(keep, weights.transpose(1, 2))


class _Outsider:
    @prunekit.hookimpl
    def prunekit_register(self, registry: Any) -> None:
        registry.strategy("test-owners", f"{__name__}:OwnerTest", summary="for a test")


class TestOtherStages:
    def test_a_router_its_scores_and_its_layers(self) -> None:
        stages = [{"use": "skip_layers", "layers": [3]}, {"use": "vtw", "at": 4}]
        trace = traced(tiny_llava(), tiny_inputs(), FASTV, *stages)
        check_against_report(trace)
        assert [len(stage.kept) for stage in trace.samples[0].stages] == [4, 0]
        assert trace.report.plans[0][3].value == "skip"

    def test_samples_that_are_asked_one_by_one(self) -> None:
        """Their scores come together as a batch's."""
        trace = traced(tiny_llava(), tiny_inputs(images=(1, 2)), {"use": "cdpruner_embeds", "keep": 0.25})
        check_against_report(trace)

    def test_smaller_images(self) -> None:
        model = tiny_model("qwen2_5_vl", layers=4)
        trace = traced(model, tiny_batch(model), {"use": "downsample"}, FASTV)
        check_against_report(trace)
        stage = trace.samples[0].stages[0]
        shown = StageMap(trace.report.events[0], stage, trace.report.visual_tokens[0], 0)
        assert "shown at" in shown.caption

    def test_fates_and_what_was_gone_before(self) -> None:
        trace = traced(tiny_llava(), tiny_inputs(), {"use": "stride", "keep": 0.5}, FASTV)
        (first, last) = (StageMap(trace.report.events[n], trace.samples[0].stages[n], 16, 0) for n in (0, 1))
        assert list(first.fates.values()).count(Fate.DROPPED) == 8
        assert {token for token, fate in last.fates.items() if fate is Fate.GONE} == set(first.trace.dropped)
        assert first.title == "stride at encoder" and last.title == "fastv at layer 2"
        assert last.caption == "4 of 8 kept, 4 dropped"


class TestAsking:
    def test_a_trace_that_nobody_asked_for_is_refused(self) -> None:
        model = tiny_llava()
        with prunekit.apply(model, {"stages": [FASTV]}) as run:
            model(**tiny_inputs())
        with pytest.raises(InputError, match=r"apply\(\.\.\., trace=True\)"):
            _ = run.trace
        with prunekit.apply(model, {"stages": [FASTV]}, trace=True) as run:
            assert run.trace is None

    @pytest.mark.parametrize("stage", [FASTV, {"use": "tome", "at": "vision.0.mid", "keep": 0.5}], ids=str)
    def test_it_changes_no_number_and_keeps_nothing_without(self, stage: dict[str, Any]) -> None:
        model, inputs = tiny_llava(), tiny_inputs(images=(1, 2))
        outputs, reports = [], []
        for trace in (False, True):
            with prunekit.apply(model, {"stages": [stage]}, trace=trace) as run:
                outputs.append(model(**inputs).logits)
                reports.append(run.report)
                kept = [decision.scores for decision in run._newest.decisions]  # type: ignore[union-attr]
                assert trace or not any(score is not None for score in kept)
        assert torch.equal(*outputs) and reports[0] == reports[1]

    def test_the_dense_model(self) -> None:
        trace = traced(tiny_llava(), tiny_inputs(images=(1, 2)), {"use": "dense"})
        assert [sample.stages for sample in trace.samples] == [(), ()]
        assert [len(sample.inputs) for sample in trace.samples] == [1, 2]
