"""Python data (dicts, lists, numpy scalars, OmegaConf containers, paths) as the tree that a file would give."""

from __future__ import annotations

import numbers
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prunekit.errors import Fault
from prunekit.spec import places
from prunekit.spec.places import MAX_DEPTH, MISSING, Node, join


def from_data(value: object, path: str, faults: list[Fault], like: Node | None = None, depth: int = 0) -> Node:
    """The tree of plain Python data, each node at the place of `like`; None: without places.

    Numbers and text of other types (numpy, subclasses) become Python's own. Containers of OmegaConf are resolved in the
    configuration that they belong to. Adds to `faults` what a file could not have said.
    """
    where, key = (like.where, like.key) if like else (None, None)
    if depth > MAX_DEPTH:
        faults.append(Fault(where, path[:80], f"is nested more than {MAX_DEPTH} levels deep"))
        return Node(None, where, key)
    if isinstance(value, Mapping):
        bad = [name for name in value if not isinstance(name, str)]
        faults.extend(Fault(where, path, f"key {name!r} is not text") for name in bad)
        items = _items(value, [name for name in value if isinstance(name, str)], path, faults)
        return Node({name: from_data(one, at, faults, like, depth + 1) for name, at, one in items}, where, key)
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        items = _items(value, range(len(value)), path, faults)
        return Node([from_data(one, at, faults, like, depth + 1) for _, at, one in items], where, key)
    scalar = _scalar(value)
    if scalar is NotImplemented:
        faults.append(Fault(where, path, f"{value!r} is not plain data", "use text, numbers, lists and dicts"))
        return Node(None, where, key)
    places.check_int(scalar, where, path, faults)
    return Node(scalar, where, key)


def is_config(value: object) -> bool:
    """It is a container of OmegaConf, which is imported if there is one."""
    return type(value).__module__.partition(".")[0] == "omegaconf"


def _items(container: Any, steps: Sequence[Any], path: str, faults: list[Fault]) -> Iterator[tuple[Any, str, object]]:
    """Each step into a container with its key path and value; what does not resolve is told and left empty."""
    for step in steps:
        at = join(path, step)
        if not is_config(container):
            yield step, at, container[step]
            continue
        from omegaconf import OmegaConf

        if OmegaConf.is_missing(container, step):
            yield step, at, MISSING
            continue
        try:
            value = container[step]
        except Exception as error:  # resolvers run the code of whoever registered them
            reason = str(error).partition("\n")[0]
            faults.append(Fault(None, at, f"does not resolve: {reason}", "look at the configuration that it came from"))
            value = None
        yield step, at, places.escape(value) if isinstance(value, str) else value


def _scalar(value: Any) -> Any:
    """A scalar as Python's own type, NotImplemented for what is none."""
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        value = value.item()
    if value is None or isinstance(value, bool):
        return value
    plain: tuple[tuple[type[Any], type[Any]], ...] = ((str, str), (numbers.Integral, int), (numbers.Real, float))
    for kind, own in plain:
        if isinstance(value, kind):
            return own(value)
    return os.fspath(value) if isinstance(value, os.PathLike) else NotImplemented
