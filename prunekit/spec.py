"""The pipeline file: its schema, and a reader that reports every fault at once. Knows no strategy, imports no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from prunekit import yaml_source
from prunekit.errors import Fault, SpecError, Where, did_you_mean
from prunekit.sites import Keep, Site
from prunekit.yaml_source import Node

TOP_KEYS = ("name", "description", "extends", "stages")
STAGE_KEYS = ("use", "at", "keep", "keep_tokens", "keep_of")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
MAX_FILES = 64
_OVERRIDE = re.compile(r"(?P<path>[A-Za-z_]\w*(?:\.\w+|\[\d{1,6}\])*)=(?P<value>.*)", re.DOTALL)


@dataclass(frozen=True)
class StageSpec:
    """One stage as the file says it; whether the strategy exists and takes these options is not known yet.

    at, keep: None when the file does not say.
    options: the strategy's own fields, plain data.
    where: of the stage; keys: of each value, by key path such as `layers[2]`. Places are None when it came from a dict.
    """

    use: str
    at: Site | None = None
    keep: Keep | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    where: Where | None = None
    keys: Mapping[str, Where | None] = field(default_factory=dict)


@dataclass(frozen=True)
class PipelineSpec:
    """A pipeline as its file says it. `source` is the path, `<inline>` or `<dict>`."""

    name: str
    stages: tuple[StageSpec, ...]
    source: str
    description: str = ""


def load(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> PipelineSpec:
    """Read a pipeline: a path, a dict, or YAML or JSON text (begins with `{` or holds a newline).

    overrides: `key=value` texts such as `stages[0].keep=0.3`, applied last; `stages[0].keep=null` takes a key out.
    Raises SpecError with every fault of the text; strategies and their options are checked by `pipeline.build`.
    """
    spec, faults = read(source, overrides)
    if faults:
        raise SpecError(faults)
    return spec


def read(
    source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()
) -> tuple[PipelineSpec, tuple[Fault, ...]]:
    """As `load`, but with the faults beside what could be read, so that more can be checked before all are raised.

    A stage whose `use` cannot be read has `use == ""`.
    """
    faults: list[Fault] = []
    label, name, values = _gather(source, faults)
    if values is None:
        return PipelineSpec(name, (), label), tuple(faults)
    tree = Node(values)
    for number, text in enumerate(overrides, start=1):
        _override(tree, text, f"override {number}", faults)
    faults.extend(_unknown_key(node, key, "", TOP_KEYS) for key, node in values.items() if key not in TOP_KEYS)
    name = _name(values.get("name"), name, faults)
    description = _text(values.get("description"), "description", faults) or ""
    start = None if label == "<dict>" else Where(label, 1, 1)
    stages = _stages(values.get("stages"), start, faults)
    return PipelineSpec(name, stages, label, description), tuple(faults)


def _gather(
    source: str | Path | Mapping[str, Any], faults: list[Fault]
) -> tuple[str, str, dict[str, Node] | None]:
    """Label and default name of a source, and its top-level keys with what it extends; None when there are none."""
    if isinstance(source, Mapping):
        tree = yaml_source.from_data(source, "", faults)
        return "<dict>", "inline", _extended(tree, Path(), (), [0], faults)
    if isinstance(source, str) and ("\n" in source or source.lstrip().startswith("{")):
        return "<inline>", "inline", _top(source, "<inline>", Path(), (), [0], faults)
    path = Path(source)
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip(".-_") or "pipeline"
    return str(path), name[:100], _file(path, Fault(Where(str(path), 1, 1), "", ""), (), [0], faults)


def _file(
    path: Path, at: Fault, chain: tuple[Path, ...], count: list[int], faults: list[Fault]
) -> dict[str, Node] | None:
    text = yaml_source.read_file(path, at, faults)
    if text is None:
        return None
    return _top(text, str(path), path.parent, (*chain, path.resolve()), count, faults)


def _top(
    text: str, label: str, base: Path, chain: tuple[Path, ...], count: list[int], faults: list[Fault]
) -> dict[str, Node] | None:
    before = len(faults)
    tree = yaml_source.parse(text, label, faults)
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
        Fault(one.where, key, f"must be the path of a pipeline file, not {_shown(one)}")
        for key, one in pairs
        if (key, one) not in good
    )
    return good


def _override(tree: Node, text: str, label: str, faults: list[Fault]) -> None:
    """Set one `key=value` in the tree; adds to `faults` if it is not one or leads nowhere."""
    match = _OVERRIDE.fullmatch(text)
    start = Where(label, 1, 1)
    if match is None:
        faults.append(Fault(start, "", f"'{text}' is not key=value", "write it as stages[0].keep=0.3"))
        return
    path = match["path"]
    steps = re.findall(r"\w+", path)
    value = yaml_source.parse(match["value"], label, faults) or Node(None)
    place = Where(label, 1, len(path) + 2)
    value = Node(value.data, place, start)
    here = tree
    for depth, step in enumerate(steps):
        last = depth == len(steps) - 1
        if isinstance(here.data, dict) and (last or step in here.data):
            if last:
                _put(here.data, step, value)
                return
            here = here.data[step]
        elif isinstance(here.data, list) and step.isdecimal() and int(step) < len(here.data):
            if last:
                here.data[int(step)] = value
                return
            here = here.data[int(step)]
        else:
            size = f"; it has {len(here.data)} entries, counted from 0" if isinstance(here.data, list) else ""
            faults.append(Fault(start, path, f"there is no '{step}' to set here{size}"))
            return


def _put(mapping: dict[str, Node], key: str, value: Node) -> None:
    if value.data is None and key in (*TOP_KEYS, *STAGE_KEYS):
        mapping.pop(key, None)
    else:
        mapping[key] = value


def _stages(node: Node | None, start: Where | None, faults: list[Fault]) -> tuple[StageSpec, ...]:
    if node is None:
        faults.append(Fault(start, "stages", "is missing", "a pipeline needs a list of stages"))
        return ()
    if not isinstance(node.data, list):
        faults.append(Fault(node.where, "stages", f"must be a list, not {_shown(node)}", "write `- use: NAME`"))
        return ()
    if not node.data:
        faults.append(Fault(node.where, "stages", "is empty", "for the unpruned model write `- use: dense`"))
    return tuple(_stage(one, f"stages[{index}]", faults) for index, one in enumerate(node.data))


def _stage(node: Node, path: str, faults: list[Fault]) -> StageSpec:
    if not isinstance(node.data, dict):
        faults.append(Fault(node.where, path, f"must be a mapping, not {_shown(node)}", "write `- use: NAME`"))
        return StageSpec("", where=node.where)
    values = node.data
    keys = {key: place for name, value in values.items() for key, place in value.places(name).items()}
    options = {key: value.plain() for key, value in values.items() if key not in STAGE_KEYS}
    use = ""
    if "use" not in values:
        hint = did_you_mean("use", values).strip() if len(values) else ""
        faults.append(Fault(node.where, f"{path}.use", "is missing", hint or "name a strategy: see `prunekit list`"))
    else:
        use = _text(values["use"], f"{path}.use", faults) or ""
    at = _at(values.get("at"), f"{path}.at", faults)
    return StageSpec(use, at, _keep(values, path, faults), options, node.where, keys)


def _at(node: Node | None, key: str, faults: list[Fault]) -> Site | None:
    if node is None:
        return None
    if isinstance(node.data, list):
        faults.append(Fault(node.where, key, "must be one site, not a list", "write one stage for each site"))
        return None
    try:
        return Site.parse(node.data)
    except ValueError as error:
        near = did_you_mean(str(node.data), ("encoder",)).strip()
        faults.append(Fault(node.where, key, str(error), near))
        return None


def _keep(values: Mapping[str, Node], path: str, faults: list[Fault]) -> Keep | None:
    fraction, tokens, of = values.get("keep"), values.get("keep_tokens"), values.get("keep_of")
    if fraction and tokens:
        message = "this stage has two budgets, `keep` and `keep_tokens`"
        faults.append(Fault(tokens.key, f"{path}.keep_tokens", message, "remove one of them"))
    if of and of.data not in ("original", "current"):
        message = f"must be 'original' or 'current', not {_shown(of)}"
        near = did_you_mean(str(of.data), ("original", "current")).strip()
        faults.append(Fault(of.where, f"{path}.keep_of", message, near))
    if of and not fraction:
        faults.append(Fault(of.key, f"{path}.keep_of", "says what `keep` is a fraction of, but there is no `keep`"))
    if tokens and not _number(tokens, int, lambda value: value >= 1):
        message = f"must be a whole number of tokens, at least 1, not {_shown(tokens)}"
        hint = "to drop all visual tokens use `vtw` or `blind`" if tokens.data == 0 else ""
        faults.append(Fault(tokens.where, f"{path}.keep_tokens", message, hint))
        return None
    if fraction and not _number(fraction, (int, float), lambda value: 0 < value <= 1):
        message = f"must be a fraction in (0, 1], not {_shown(fraction)}"
        faults.append(Fault(fraction.where, f"{path}.keep", message, _keep_hint(fraction.data)))
        return None
    if tokens:
        return Keep(tokens=cast("int", tokens.data))
    base: Literal["original", "current"] = "current" if of and of.data == "current" else "original"
    return Keep(fraction=float(cast("float", fraction.data)), of=base) if fraction else None


def _keep_hint(value: object) -> str:
    if value == 0:
        return "to drop all visual tokens use `vtw` or `blind`"
    if isinstance(value, int | float) and value > 1:
        return "for a number of tokens write `keep_tokens`, for per cent divide by 100"
    return ""


def _number(node: Node, kind: Any, fits: Any) -> bool:
    value = node.data
    return isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value) and bool(fits(value))


def _name(node: Node | None, default: str, faults: list[Fault]) -> str:
    text = _text(node, "name", faults)
    if text is None:
        return default
    if not NAME.fullmatch(text):
        message = f"{text!r} must be letters, digits, '.', '_' and '-', at most 100, beginning with a letter or digit"
        faults.append(Fault(node.where if node else None, "name", message, "it names result files"))
        return default
    return text


def _text(node: Node | None, key: str, faults: list[Fault]) -> str | None:
    """Text of a node; None, with a fault, when it holds something else, and None without one when there is no node."""
    if node is None:
        return None
    if isinstance(node.data, str) and node.data:
        return node.data
    hint = "put it in quotes" if isinstance(node.data, int | float | bool) else ""
    faults.append(Fault(node.where, key, f"must be text, not {_shown(node)}", hint))
    return None


def _unknown_key(node: Node, key: str, path: str, known: Sequence[str]) -> Fault:
    hint = f"{did_you_mean(key, known)}known keys: {', '.join(known)}"
    return Fault(node.key, f"{path}.{key}" if path else key, "unknown key", hint)


def _shown(node: Node) -> str:
    """A value as messages show it: shortened, nothing for `null`."""
    if node.data is None:
        return "nothing"
    if isinstance(node.data, dict):
        return "a mapping"
    if isinstance(node.data, list):
        return "a list"
    shown = repr(node.data)
    return shown if len(shown) <= 60 else shown[:57] + "..."
