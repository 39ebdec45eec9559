"""The pipeline file: its schema, and a reader that reports every fault at once. Knows no strategy, imports no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from prunekit.errors import Fault, SpecError, Where, did_you_mean
from prunekit.gather import gather
from prunekit.sites import Keep, Site
from prunekit.yaml_source import Node

TOP_KEYS = ("name", "description", "extends", "stages")
STAGE_KEYS = ("use", "at", "keep", "keep_tokens", "keep_of")
DROP_ALL = "dropping all has strategies of its own: see `prunekit list strategies`"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class StageSpec:
    """One stage as the file says it; whether the strategy exists and takes these options is not known yet.

    at, keep: None when the file does not say.
    options: the strategy's own fields, plain data.
    where: of the stage; keys: of each value, by key path such as `layers[2]`; names: of each key itself. Places are
    None when the stage came from a dict.
    """

    use: str
    at: Site | None = None
    keep: Keep | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    where: Where | None = None
    keys: Mapping[str, Where | None] = field(default_factory=dict)
    names: Mapping[str, Where | None] = field(default_factory=dict)


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
    found = gather(source, overrides, frozenset((*TOP_KEYS, *STAGE_KEYS)), faults)
    label, values, unread = found.label, found.values, bool(faults)
    if values is None:
        return PipelineSpec(found.name, (), label), tuple(faults)
    faults.extend(_unknown_key(node, key, "", TOP_KEYS) for key, node in values.items() if key not in TOP_KEYS)
    name = _name(values.get("name"), found.name, faults)
    description = _text(values.get("description"), "description", faults) or ""
    if "stages" in values:
        stages = _stages(values["stages"], faults)
    else:
        stages = ()
        if not unread:  # what could not be read may have held them
            start = None if label == "<dict>" else Where(label, 1, 1)
            faults.append(Fault(start, "stages", "is missing", "a pipeline needs a list of stages"))
    return PipelineSpec(name, stages, label, description), tuple(faults)


def _stages(node: Node, faults: list[Fault]) -> tuple[StageSpec, ...]:
    if not isinstance(node.data, list):
        faults.append(Fault(node.where, "stages", f"must be a list, not {node}", "write `- use: NAME`"))
        return ()
    if not node.data:
        faults.append(Fault(node.where, "stages", "is empty", "name at least one: `- use: NAME`"))
    return tuple(_stage(one, f"stages[{index}]", faults) for index, one in enumerate(node.data))


def _stage(node: Node, path: str, faults: list[Fault]) -> StageSpec:
    if not isinstance(node.data, dict):
        faults.append(Fault(node.where, path, f"must be a mapping, not {node}", "write `- use: NAME`"))
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
    names = {name: value.key for name, value in values.items()}
    return StageSpec(use, at, _keep(values, path, faults), options, node.where, keys, names)


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
        message = f"must be 'original' or 'current', not {of}"
        near = did_you_mean(str(of.data), ("original", "current")).strip()
        faults.append(Fault(of.where, f"{path}.keep_of", message, near))
    if of and not fraction:
        faults.append(Fault(of.key, f"{path}.keep_of", "says what `keep` is a fraction of, but there is no `keep`"))
    if tokens and not _number(tokens, int, lambda value: value >= 1):
        message = f"must be a whole number of tokens, at least 1, not {tokens}"
        hint = DROP_ALL if tokens.data == 0 and not isinstance(tokens.data, bool) else ""
        faults.append(Fault(tokens.where, f"{path}.keep_tokens", message, hint))
        return None
    if fraction and not _number(fraction, (int, float), lambda value: 0 < value <= 1):
        message = f"must be a fraction in (0, 1], not {fraction}"
        faults.append(Fault(fraction.where, f"{path}.keep", message, _keep_hint(fraction.data)))
        return None
    if tokens:
        return Keep(tokens=cast("int", tokens.data))
    base: Literal["original", "current"] = "current" if of and of.data == "current" else "original"
    return Keep(fraction=float(cast("float", fraction.data)), of=base) if fraction else None


def _keep_hint(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ""
    if value == 0:
        return DROP_ALL
    if value > 1:
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
    faults.append(Fault(node.where, key, f"must be text, not {node}", hint))
    return None


def _unknown_key(node: Node, key: str, path: str, known: Sequence[str]) -> Fault:
    hint = f"{did_you_mean(key, known)}known keys: {', '.join(known)}"
    return Fault(node.key, f"{path}.{key}" if path else key, "unknown key", hint)
