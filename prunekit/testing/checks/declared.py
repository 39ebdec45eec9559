"""What a strategy says about itself, and its options."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from typing import Any

import prunekit
from prunekit import plugins
from prunekit.testing.check import check, expect
from prunekit.testing.subject import Subject


@check(
    "It can be built and fits the contract's model, which has the layers, the tower and the inputs that it asks for. "
    "Other rules are tried only where it does.",
    "options that it needs (`options` of the contract); sites of a deeper model, or inputs that a LLaVA with a CLIP "
    "tower does not have: override `model()` of the contract, and with another family `inputs()` and `row()`.",
)
def model(subject: Subject) -> None:
    expect(not subject.misfit, subject.misfit)


@check(
    "The docstring of the class or of its module links the paper, or says that it is a baseline, and the registered "
    "name has a one-line summary, which `prunekit list` shows.",
    "a missing docstring; `registry.strategy(name, target)` without `summary`.",
)
def source(subject: Subject) -> None:
    cls = subject.cls
    text = f"{sys.modules[cls.__module__].__doc__ or ''} {inspect.getdoc(cls) or ''}"
    expect("https://" in text or "baseline" in text.lower(), f"{cls.__name__} names no paper and is no baseline")
    expect(plugins.registry().strategy_entry(subject.use).summary, "the registered name has no summary")


@check(
    "A strategy is a frozen dataclass: its fields are its options, and nothing of one run reaches the next. What lives "
    "for one prompt batch belongs into the input `state`.",
    "`object.__setattr__` in a hook; a list or dict among the fields or the constants of the class that hooks write "
    "to.",
)
def frozen(subject: Subject) -> None:
    cls = subject.cls
    params: Any = getattr(cls, "__dataclass_params__", None)
    expect(dataclasses.is_dataclass(cls) and params.frozen, f"{cls.__name__} is no frozen dataclass")
    pipeline = subject.build()
    strategy = pipeline.stages[0].strategy
    before = _remembered(strategy)
    subject.apply(pipeline, subject.batch("one"))
    after = _remembered(strategy)
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    expect(not changed, f"after a run {', '.join(changed)} of {cls.__name__} is another than before")


def _remembered(strategy: Any) -> dict[str, str]:
    """Fields of the instance and data of its classes, as text."""
    found = {name: repr(value) for name, value in vars(strategy).items()}
    for base in type(strategy).__mro__[:-1]:
        data = {name: value for name, value in vars(base).items() if isinstance(value, list | dict | set | int | float)}
        found |= {f"{base.__name__}.{name}": repr(value) for name, value in data.items() if not name.startswith("__")}
    return found


@check(
    "The pipeline that `prunekit show --resolved` prints loads again to the same strategy and the same hash, so that a "
    "result can be repeated from what was stored with it.",
    "`__post_init__` that writes something else into a field than it was given, each time anew; an option whose value "
    "YAML does not give back (write its type in the annotation).",
)
def yaml_round_trip(subject: Subject) -> None:
    first = subject.build()
    again = prunekit.load(first.resolved)
    one, other = first.stages[0].strategy, again.stages[0].strategy
    expect(one == other, f"it was {one}, and is {other} after being written and read")
    expect(first.sha == again.sha, f"the hash was {first.sha}, and is {again.sha}:\n{again.resolved}")
