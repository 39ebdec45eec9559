"""What tests of strategies share: asking one hook of a stage as the engine would, and the authors' own choices."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from golden_files import golden_cases

import prunekit
from prunekit import hookspecs, plugins
from prunekit.pipeline.stage import Stage
from prunekit.strategy.declare import takes_keep


def cases(name: str, count: int) -> list[Any]:
    """The cases of `tests/goldens/NAME.json` as pytest parameters, of which there must be `count`."""
    found = golden_cases(name)
    assert len(found) == count
    return [pytest.param(case, id=case["id"]) for case in found]


def stage_of(use: str, **keys: Any) -> Stage:
    """The one stage of a pipeline with these keys; `keep` is 0.5 where it takes one and none is named."""
    given = {"keep", "keep_tokens"} & set(keys) or not takes_keep(plugins.registry().get_strategy(use))
    return unbudgeted(use, **(keys if given else {"keep": 0.5, **keys}))


def unbudgeted(use: str, **keys: Any) -> Stage:
    """The same without a budget, unless it is among the keys."""
    return prunekit.load({"name": use, "stages": [{"use": use, **keys}]}).stages[0]


def ask(stage: Stage, hook: str, **arguments: Any) -> Any:
    """A token hook of the stage with these arguments; what nobody asked for is None, as in the engine."""
    function = getattr(hookspecs.TokenHooks, hook)
    others = dict.fromkeys(name for name in inspect.signature(function).parameters if name != "self")
    return getattr(stage.hook, hook)(**{**others, **arguments})
