"""One budget over several sites, schedules that scale with the vision tower, and the sites as an input."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import pytest

import prunekit
from prunekit import Keep, Site, Sites, hookimpl, strategy
from prunekit.families import shape_of
from prunekit.pipeline.build import build
from prunekit.registry import Registry
from prunekit.testing.tiny import tiny_inputs, tiny_llava
from prunekit.verify.equivalence import assert_equivalent


def every_block(self, layers, blocks):
    """0.5 in the end, in equal steps."""
    return {Site(block, "vision", "after"): 1 - 0.5 * (block + 1) / blocks for block in range(blocks)}


@strategy(sites=Sites(tower=True), schedule=every_block, spread=True)
class Spread:
    """A baseline: the longest states, some at each block."""

    SEEN: ClassVar[list[tuple[int, tuple[Site, ...]]]] = []

    @hookimpl
    def score_tokens(self, hidden, sites, cut):
        self.SEEN.append((cut, sites))
        return hidden.norm(dim=-1)


@pytest.fixture
def registry():
    Spread.SEEN.clear()
    made = Registry()
    made.strategy("spread", f"{__name__}:Spread")
    return made


@pytest.mark.parametrize("wanted", [*range(18), 100])
@pytest.mark.parametrize("cuts", [1, 2, 3, 7])
def test_equal_parts_of_what_has_to_go(wanted, cuts):
    """The last cut leaves the number itself, those before it differ by one token at most."""
    current, gone = 17, []
    for left in range(cuts, 0, -1):
        count = Keep(tokens=wanted, cuts=left).count(17, current)
        gone.append(current - count)
        current = count
    assert current == min(wanted, 17)
    assert max(gone) - min(gone) <= 1 and gone == sorted(gone, reverse=True)


def test_a_fraction_of_the_original_is_spread_and_nothing_comes_of_nothing():
    assert [Keep(0.25, cuts=left).count(16, now) for left, now in ((2, 16), (1, 10))] == [10, 4]
    assert Keep(0.25, cuts=3).count(16, 0) == 0


KEPT = {
    "by the schedule": ({}, [12, 8]),
    "a number for the last": ({"keep_tokens": 3}, [9, 3]),
    "a fraction for the last": ({"keep": 0.25}, [10, 4]),
    "one for each": ({"at": ["vision.0", "vision.1"], "keep": [0.25, 0.125]}, [4, 2]),
    "of what reaches each": ({"keep": 0.5, "keep_of": "current"}, [8, 4]),
    "at other sites": ({"keep": 0.5, "at": ["encoder", 2, 4, 5]}, [14, 12, 10, 8]),
    "at one site": ({"keep": 0.5, "at": 2}, [8]),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_each_site_keeps(registry, name):
    keys, kept = KEPT[name]
    pipeline = build({"stages": [{"use": "spread", **keys}]}, registry=registry)
    model = tiny_llava()
    with prunekit.apply(model, pipeline) as run:
        model(**tiny_inputs())
    assert [len(event.kept[0]) for event in run.report.events] == kept
    assert [event.asked for event in run.report.events] == [(one,) for one in kept]
    assert [cut for cut, _ in Spread.SEEN] == list(range(len(kept)))
    assert {tuple(map(str, sites)) for _, sites in Spread.SEEN} == {tuple(event.site for event in run.report.events)}


def test_it_is_exact(registry):
    pipeline = build({"stages": [{"use": "spread"}]}, registry=registry)
    assert_equivalent(tiny_llava(), pipeline, tiny_inputs(images=(1, 2), text=(5, 9)), steps=2)


def test_blocks_are_those_that_lead_to_the_features(registry):
    """The tiny tower has three blocks, of which the projector gets the second; before a model there are no sites."""
    pipeline = build({"stages": [{"use": "spread"}]}, registry=registry)
    assert "at:" not in pipeline.resolved
    shape = shape_of(tiny_llava())
    assert shape.tower_depth == 2
    assert [str(cut.site) for cut in pipeline.bind(shape).cuts] == ["vision.0", "vision.1"]


def test_a_tower_that_cannot_be_cut_is_named(registry):
    shape = dataclasses.replace(shape_of(tiny_llava()), tower=None)
    with pytest.raises(prunekit.SpecError, match="this model's vision tower cannot be cut"):
        build({"stages": [{"use": "spread"}]}, registry=registry).bind(shape)
