"""What `prunekit train` refuses, each by its own words, before anything is learned."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest

import prunekit
from prunekit import Site
from prunekit.training.learner import learner_of
from prunekit.training.teacher import check_cuts, router_of


def said(phrase):
    return pytest.raises(prunekit.Unsupported, match=re.escape(phrase))


@pytest.mark.parametrize("routers", [0, 2])
def test_a_pipeline_has_one_router(routers):
    stages = [SimpleNamespace(is_router=True)] * routers + [SimpleNamespace(is_router=False)]
    with said(f"training needs a pipeline with one router, and 'p' has {routers}"):
        router_of(SimpleNamespace(name="p", stages=stages))


def test_where_a_router_that_is_trained_cuts():
    router, other = SimpleNamespace(label="stages[0] par"), SimpleNamespace(label="stages[1] random")

    def bound(*cuts):
        before = lambda asked: False  # noqa: E731  the router is asked before all of them
        made = [SimpleNamespace(stage=stage, site=Site(layer), comes_before=before) for stage, layer in cuts]
        return SimpleNamespace(cuts=made)

    check_cuts(bound((router, 2), (other, 3)), router)
    check_cuts(bound((router, 2), (router, 4), (other, 5)), router)
    for cuts in ([(other, 1), (router, 2)], [(router, 2), (other, 3), (router, 4)]):
        with said("another stage cuts tokens between the decision of stages[0] par and its own cut"):
            check_cuts(bound(*cuts), router)


def test_a_strategy_that_has_nothing_to_train():
    with said("has nothing to train: its class does not implement the hook `learner`"):
        learner_of(SimpleNamespace(states=lambda hook: hook != "learner", label="stages[0] lots"), None, None)
