"""The page about the primitives, and their twins, are complete."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import naive
from prunekit_evals.bench import primitives

from prunekit import ops

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "ops.md"


def test_every_primitive_is_documented_with_its_arguments() -> None:
    documented = re.findall(r"^\| `(\w+)\((.*?)\)` \|", PAGE.read_text(encoding="utf-8"), flags=re.M)
    assert len(documented) == len(dict(documented)), "a primitive is documented twice"
    signatures = {}
    for name in ops.__all__:
        parameters = inspect.signature(getattr(ops, name)).parameters.values()
        empty = inspect.Parameter.empty
        signatures[name] = ", ".join(
            p.name if p.default is empty else f"{p.name}={p.default!r}".replace("'", '"') for p in parameters
        )
    assert dict(documented) == signatures


def test_every_primitive_has_a_twin() -> None:
    assert [name for name in ops.__all__ if not callable(getattr(naive, name, None))] == []


def test_costs_are_measured_and_shown() -> None:
    names = re.findall(r"^\| `(\w+)` \|", PAGE.read_text(encoding="utf-8").partition("<!-- cost -->")[2], flags=re.M)
    times = primitives.milliseconds(12, 4, rounds=1)
    assert names == list(times) and set(names) <= set(ops.__all__)
    assert all(time >= 0 for time in times.values())
    assert primitives.table({"4 of 12": times}).count("\n") == len(times) + 1
