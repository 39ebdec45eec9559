"""A pipeline source with the files that it extends and its overrides, as one tree of places and values."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, cast

from prunekit.errors import Fault, Where
from prunekit.spec import places
from prunekit.spec.places import Node

MAX_FILES = 64
_OVERRIDE = re.compile(r"(?P<path>[A-Za-z_]\w*(?:\.\w+|\[\d{1,6}\])*)=(?P<value>.*)", re.DOTALL)


@dataclass(frozen=True)
class Gathered:
    """label: the path, `<inline>` or `<dict>`. name: what the pipeline is called if it does not say.

    values: its top-level keys; None when there is nothing to read, and a fault says why.
    """

    label: str
    name: str
    values: dict[str, Node] | None


def gather(
    source: str | Path | Mapping[str, Any], overrides: Sequence[str], removable: frozenset[str], faults: list[Fault]
) -> Gathered:
    """Read `source`, merge what it extends under it, and apply the overrides. Adds what is wrong to `faults`.

    removable: keys that an override takes out by setting them to null.
    """
    found = _base(source, faults)
    if found.values is not None:
        tree = Node(found.values)
        for number, text in enumerate(overrides, start=1):
            _override(tree, text, f"override {number}", removable, faults)
    return found


def _base(source: str | Path | Mapping[str, Any], faults: list[Fault]) -> Gathered:
    if isinstance(source, Mapping):
        tree = places.from_data(source, "", faults)
        return Gathered("<dict>", "inline", _extended(tree, Path(), (), [0], faults))
    if isinstance(source, str) and ("\n" in source or source.lstrip().startswith("{")):
        return Gathered("<inline>", "inline", _top(source, "<inline>", Path(), (), [0], faults))
    given: object = source  # callers in Python may hand over anything
    if not isinstance(given, str | PathLike):
        message = f"a pipeline is a path, a dict or YAML text, not {type(given).__name__}"
        faults.append(Fault(None, "", message, "a list of stages goes under `stages`"))
        return Gathered("<dict>", "inline", None)
    path = Path(source)
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip(".-_") or "pipeline"
    return Gathered(str(path), name[:100], _file(path, Fault(None, "", ""), (), [0], faults))


def _file(
    path: Path, at: Fault, chain: tuple[Path, ...], count: list[int], faults: list[Fault]
) -> dict[str, Node] | None:
    text = places.read_file(path, at, faults)
    if text is None:
        return None
    return _top(text, str(path), path.parent, (*chain, path.resolve()), count, faults)


def _top(
    text: str, label: str, base: Path, chain: tuple[Path, ...], count: list[int], faults: list[Fault]
) -> dict[str, Node] | None:
    before = len(faults)
    tree = places.parse(text, label, faults)
    if tree is None or tree.data is None:
        if len(faults) == before:
            faults.append(Fault(Where(label, 1, 1), "", "is empty", "a pipeline needs at least `stages:`"))
        return None
    return _extended(tree, base, chain, count, faults)


def _extended(
    tree: Node, base: Path, chain: tuple[Path, ...], count: list[int], faults: list[Fault]
) -> dict[str, Node] | None:
    """The keys of one file over those of the files that it extends, left to right. A name is not inherited."""
    if not isinstance(tree.data, dict):
        faults.append(Fault(tree.where, "", "must be a mapping with `stages:`", "see `prunekit list pipelines`"))
        return None
    merged: dict[str, Node] = {}
    for key, node in _parents(tree.data.get("extends"), faults):
        path = base / cast("str", node.data)
        count[0] += 1
        if path.resolve() in chain:
            circle = " -> ".join(str(one.name) for one in (*chain[chain.index(path.resolve()) :], path))
            faults.append(Fault(node.where, key, f"extends itself in a circle: {circle}", "break the circle"))
        elif count[0] > MAX_FILES:
            faults.append(Fault(node.where, key, f"pulls in more than {MAX_FILES} files"))
            break
        else:
            parent = _file(path, Fault(node.where, key, ""), chain, count, faults) or {}
            merged |= {one: value for one, value in parent.items() if one != "name"}
    own = {key: node for key, node in tree.data.items() if key != "extends"}
    return {**merged, **own}


def _parents(node: Node | None, faults: list[Fault]) -> list[tuple[str, Node]]:
    if node is None:
        return []
    listed = isinstance(node.data, list)
    pairs = [(f"extends[{i}]", one) for i, one in enumerate(node.data)] if isinstance(node.data, list) else []
    pairs = pairs if listed else [("extends", node)]
    good = [(key, one) for key, one in pairs if isinstance(one.data, str) and one.data]
    faults.extend(
        Fault(one.where, key, f"must be the path of a pipeline file, not {one}")
        for key, one in pairs
        if (key, one) not in good
    )
    return good


def _override(tree: Node, text: str, label: str, removable: frozenset[str], faults: list[Fault]) -> None:
    """Set one `key=value` in the tree; adds to `faults` if it is not one or leads nowhere."""
    match = _OVERRIDE.fullmatch(text)
    start = Where(label, 1, 1)
    if match is None:
        faults.append(Fault(start, "", f"'{text}' is not key=value", "write it as stages[0].keep=0.3"))
        return
    path = match["path"]
    steps = re.findall(r"\w+", path)
    before = len(faults)
    value = places.parse(match["value"], label, faults) or Node(None)
    if len(faults) > before:
        return
    value = Node(value.data, Where(label, 1, len(path) + 2), start)
    here = tree
    for depth, step in enumerate(steps):
        last = depth == len(steps) - 1
        if isinstance(here.data, dict) and (last or step in here.data):
            if last:
                _put(here.data, step, value, removable)
            here = here.data.get(step, value)
        elif isinstance(here.data, list) and step.isdecimal() and int(step) < len(here.data):
            if last:
                here.data[int(step)] = value
            here = here.data[int(step)]
        else:
            size = f"; it has {len(here.data)} entries, counted from 0" if isinstance(here.data, list) else ""
            faults.append(Fault(start, path, f"there is no '{step}' to set here{size}"))
            return


def _put(mapping: dict[str, Node], key: str, value: Node, removable: frozenset[str]) -> None:
    if value.data is None and key in removable:
        mapping.pop(key, None)
    else:
        mapping[key] = value
