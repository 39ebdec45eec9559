"""A pipeline from its source, the files that it extends, overrides and `${...}`: one tree of values with places.

OmegaConf's rules, on nodes that keep their places: files merge as `OmegaConf.merge` does, overrides are its dotlist,
and OmegaConf itself resolves `${...}`. docs/decisions/omegaconf-composes.md says why.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, cast

from prunekit.errors import Fault, SpecError, Where, did_you_mean
from prunekit.spec import places
from prunekit.spec.interpolation import Resolution, resolve
from prunekit.spec.places import MISSING, Node, join
from prunekit.spec.python_data import from_data, is_config

MAX_FILES = 64
_OVERRIDE = re.compile(r"(?P<path>[A-Za-z_]\w*(?:\.\w+|\[\d{1,6}\])*)=(?P<value>.*)", re.DOTALL)

# A tree is what stands in another file.
Source = str | PathLike[str] | Mapping[str, Any] | Sequence[Any] | Node


@dataclass(frozen=True)
class Kind:
    """What is composed, as messages call it. needs: the key that it cannot be without. examples: where to find some."""

    noun: str = "pipeline"
    needs: str = "stages"
    examples: str = "see `prunekit list pipelines`"


PIPELINE = Kind()


@dataclass(frozen=True)
class Composed:
    """label: the path, `<inline>` or `<dict>`. name: what the pipeline is called if it does not say.

    values: its top-level keys, without `vars`; None when there is nothing to read, and a fault says why.
    resolution: what became of values that are not simply written in it.
    """

    label: str
    name: str
    values: dict[str, Node] | None
    resolution: Resolution = field(default_factory=Resolution)


def compose(
    source: Source, overrides: Sequence[str], removable: frozenset[str], faults: list[Fault], kind: Kind = PIPELINE
) -> Composed:
    """Read `source`, merge what it extends under it, apply the overrides, resolve `${...}`. Adds faults to `faults`.

    removable: keys that an override takes out by setting them to null. Raises SpecError for overrides that are no list
    of text.
    """
    read = _read(source, faults, kind)
    tree = Node(read.values or {})
    for number, text in enumerate(_texts(overrides), start=1):
        if read.values is not None:
            _override(tree, text, f"override {number}", removable, faults)
    tree, resolution = resolve(tree, faults)
    _refuse_missing(tree, "", faults)
    values = cast("dict[str, Node]", tree.data)
    variables = values.pop("vars", None)
    if variables is not None and not isinstance(variables.data, dict) and "vars" not in resolution.unread:
        hint = "such as {keep: 0.5}, for ${vars.keep}"
        faults.append(Fault(variables.where, "vars", f"must be a mapping, not {variables}", hint))
    unread = resolution.unread | {fault.key for fault in faults if fault.key}
    resolution = dataclasses.replace(resolution, unread=unread)
    return dataclasses.replace(read, values=None if read.values is None else values, resolution=resolution)


def _read(source: Source, faults: list[Fault], kind: Kind) -> Composed:
    """The source with what it extends."""
    data: Any = source
    if isinstance(data, Node):
        label = data.where.file if data.where else "<dict>"
        tree = _written_again(data)
        return Composed(label, "inline", _extended(tree, data.folder, (), [0], faults, kind))
    if dataclasses.is_dataclass(data):
        from omegaconf import OmegaConf

        data = OmegaConf.structured(data)
    if is_config(data) and not isinstance(data, Mapping):
        data = {"stages": data}
    if isinstance(data, Mapping):
        tree = from_data(data, "", faults)
        if is_config(data) and isinstance(tree.data, dict):
            tree.data.pop("vars", None)  # resolved where they belong: an override of one would change nothing
        return Composed("<dict>", "inline", _extended(tree, Path(), (), [0], faults, kind))
    if isinstance(data, str) and ("\n" in data or ": " in data or data.lstrip().startswith("{")):
        return Composed("<inline>", "inline", _top(data, "<inline>", Path(), (), [0], faults, kind))
    if not isinstance(data, str | PathLike):
        message = f"a {kind.noun} is a path, a dict or YAML text, not {type(data).__name__}"
        faults.append(Fault(None, "", message, f"a list of {kind.needs} goes under `{kind.needs}`"))
        return Composed("<dict>", "inline", None)
    path = Path(data)
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip(".-_") or kind.noun
    return Composed(str(path), name[:100], _file(path, Fault(None, "", ""), (), [0], faults, kind))


def _written_again(node: Node) -> Node:
    """A copy of a tree in which `${...}` is resolved, as a file would have it: overrides change the copy."""
    if isinstance(node.data, dict):
        return dataclasses.replace(node, data={key: _written_again(one) for key, one in node.data.items()})
    if isinstance(node.data, list):
        return dataclasses.replace(node, data=[_written_again(one) for one in node.data])
    return dataclasses.replace(node, data=places.escape(node.data)) if isinstance(node.data, str) else node


def _file(
    path: Path, at: Fault, chain: tuple[Path, ...], count: list[int], faults: list[Fault], kind: Kind
) -> dict[str, Node] | None:
    text = places.read_file(path, at, faults)
    if text is None:
        return None
    return _top(text, str(path), path.parent, (*chain, path.resolve()), count, faults, kind)


def _top(
    text: str, label: str, base: Path, chain: tuple[Path, ...], count: list[int], faults: list[Fault], kind: Kind
) -> dict[str, Node] | None:
    before = len(faults)
    tree = places.parse(text, label, faults)
    if tree is None or tree.data is None:
        if len(faults) == before:
            faults.append(Fault(Where(label, 1, 1), "", "is empty", f"a {kind.noun} needs at least `{kind.needs}:`"))
        return None
    return _extended(tree, base, chain, count, faults, kind)


def _extended(
    tree: Node, base: Path, chain: tuple[Path, ...], count: list[int], faults: list[Fault], kind: Kind
) -> dict[str, Node] | None:
    """The keys of one file merged over those of the files that it extends, left to right. A name is not inherited."""
    if not isinstance(tree.data, dict):
        faults.append(Fault(tree.where, "", f"must be a mapping with `{kind.needs}:`", kind.examples))
        return None
    merged = Node({})
    for key, node in _parents(tree.data.get("extends"), faults, kind):
        path = base / cast("str", node.data)
        count[0] += 1
        if path.resolve() in chain:
            cycle = " -> ".join(str(one.name) for one in (*chain[chain.index(path.resolve()) :], path))
            faults.append(Fault(node.where, key, f"extends itself in a cycle: {cycle}", "break the cycle"))
        elif count[0] > MAX_FILES:
            faults.append(Fault(node.where, key, f"pulls in more than {MAX_FILES} files"))
            break
        else:
            parent = _file(path, Fault(node.where, key, ""), chain, count, faults, kind) or {}
            inherited = {one: value for one, value in parent.items() if one != "name"}
            merged = merge(merged, Node(inherited), "", faults)
    own = {key: node for key, node in tree.data.items() if key != "extends"}
    return cast("dict[str, Node]", merge(merged, Node(own), "", faults).data)


def merge(base: Node, own: Node, path: str, faults: list[Fault]) -> Node:
    """`own` over `base`, by the rules of `OmegaConf.merge`: mappings merge key by key, anything else replaces.

    `???` leaves what is under it. Where OmegaConf cannot merge, or would have to resolve a `${...}` first, a fault says
    so and `own` replaces.
    """
    if own.data == MISSING:
        return base
    if isinstance(base.data, dict) and isinstance(own.data, dict):
        data = dict(base.data)
        for key, node in own.data.items():
            data[key] = merge(data[key], node, join(path, key), faults) if key in data else node
        return Node(data, own.where, own.key)
    containers = isinstance(base.data, dict | list) and isinstance(own.data, dict | list)
    if containers and type(base.data) is not type(own.data):
        message = f"is {own}, but {base} at {base.where}, which this file extends"
        faults.append(Fault(own.where, path, message, "let both be the same, or name the key differently"))
    if isinstance(own.data, dict) and isinstance(base.data, str) and "${" in base.data:
        message = f"is a mapping, but {base} at {base.where}, which is resolved only after files are merged"
        faults.append(Fault(own.where, path, message, "write the whole value in one of the two files"))
    return own


def _parents(node: Node | None, faults: list[Fault], kind: Kind) -> list[tuple[str, Node]]:
    if node is None:
        return []
    listed = isinstance(node.data, list)
    pairs = [(f"extends[{i}]", one) for i, one in enumerate(node.data)] if isinstance(node.data, list) else []
    pairs = pairs if listed else [("extends", node)]
    good = [(key, one) for key, one in pairs if isinstance(one.data, str) and one.data and "${" not in one.data]
    for key, one in pairs:
        if (key, one) not in good:
            hint = "files are read before ${...} is resolved" if "${" in str(one) else ""
            faults.append(Fault(one.where, key, f"must be the path of a {kind.noun} file, not {one}", hint))
    return good


def _texts(overrides: Sequence[str]) -> Sequence[str]:
    """The overrides themselves. Raises SpecError for anything but a sequence of text."""
    hint = "write overrides=['stages[0].keep=0.3']"
    if isinstance(overrides, str | bytes) or not isinstance(overrides, Sequence):
        message = f"overrides is a list of key=value texts, not {type(overrides).__name__}"
        raise SpecError([Fault(None, "", message, hint)])
    wrong = [number for number, text in enumerate(overrides, start=1) if not isinstance(text, str)]
    if wrong:
        raise SpecError([Fault(Where(f"override {number}", 1, 1), "", "is no text", hint) for number in wrong])
    return overrides


def _override(tree: Node, text: str, label: str, removable: frozenset[str], faults: list[Fault]) -> None:
    """Set one `key=value` in the tree; adds to `faults` if it is not one or leads nowhere."""
    match = _OVERRIDE.fullmatch(text)
    start = Where(label, 1, 1)
    if match is None:
        faults.append(Fault(start, "", f"'{text}' is not key=value", "write it as stages[0].keep=0.3"))
        return
    path = match["path"]
    before = len(faults)
    value = places.parse(match["value"], label, faults) or Node(None)
    if len(faults) > before:
        return
    value = Node(value.data, Where(label, 1, len(path) + 2), start)
    *parents, last = re.findall(r"\w+", path)
    declared = path.partition(".")[0] == "vars"  # nothing would read a new one, so none is made
    here = tree
    for step in parents:
        if isinstance(here.data, dict) and not declared:  # as in OmegaConf, mappings on the way are made
            here.data.setdefault(step, Node({}, start, start))
        below = _entry(here, step)
        if below is None:
            faults.append(_no_entry(here, step, path, start))
            return
        here = below
    if isinstance(here.data, dict) and not (declared and last not in here.data):
        _put(here.data, last, value, removable if not declared else frozenset())
    elif isinstance(here.data, list) and _entry(here, last) is not None:
        here.data[int(last)] = value
    else:
        faults.append(_no_entry(here, last, path, start))


def _entry(node: Node, step: str) -> Node | None:
    if isinstance(node.data, dict):
        return node.data.get(step)
    if isinstance(node.data, list) and step.isdecimal() and int(step) < len(node.data):
        return node.data[int(step)]
    return None


def _no_entry(node: Node, step: str, path: str, start: Where) -> Fault:
    names = list(node.data) if isinstance(node.data, dict) else []
    size = f"; it has {len(node.data)} entries, counted from 0" if isinstance(node.data, list) else ""
    hint = did_you_mean(step, names).strip()
    if not hint and path.partition(".")[0] == "vars":
        hint = "an override changes what stands under `vars`; write a new value into the file"
    elif not isinstance(node.data, dict | list):
        hint = f"{node} holds no values of its own"
    return Fault(start, path, f"there is no '{step}' to set here{size}", hint)


def _put(mapping: dict[str, Node], key: str, value: Node, removable: frozenset[str]) -> None:
    if value.data is None and key in removable:
        mapping.pop(key, None)
    else:
        mapping[key] = value


def _refuse_missing(node: Node, path: str, faults: list[Fault]) -> None:
    """Add a fault for each `???` that nobody has set."""
    if isinstance(node.data, dict):
        for key, child in node.data.items():
            _refuse_missing(child, join(path, key), faults)
    elif isinstance(node.data, list):
        for index, child in enumerate(node.data):
            _refuse_missing(child, join(path, index), faults)
    elif node.data == MISSING:
        hint = f"such as {path}=... on the command line"
        faults.append(Fault(node.where, path, "must be set: ??? stands for a value that is missing", hint))
