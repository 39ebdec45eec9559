"""Checks the options of a stage against the fields of its strategy's dataclass: no coercion, every problem at once."""

from __future__ import annotations

import dataclasses
import math
import os
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from prunekit.errors import PluginError, did_you_mean
from prunekit.strategy import meant

# Keys that every stage of a pipeline file may have, whatever its strategy; no option has such a name.
STAGE_KEYS = ("use", "at", "keep", "keep_tokens", "keep_of", "keep_layers", "route_at")
BUDGETS = ("keep", "keep_tokens", "keep_of")


WORDS = {
    int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "nothing", Path: "a path",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Problem:
    """One wrong option: `key` is a path below the stage, such as `layers[2]`; `unknown`: the key itself is wrong."""

    key: str
    message: str
    hint: str = ""
    unknown: bool = False


@dataclasses.dataclass(frozen=True)
class _Check:
    """problems: what is wrong so far. folders: where relative paths start from, by key; else in the working folder."""

    problems: list[Problem]
    folders: Mapping[str, Path]


def check(
    cls: type[Any],
    values: Mapping[str, Any],
    stage_keys: Sequence[str],
    problems: list[Problem],
    folders: Mapping[str, Path] | None = None,
) -> dict[str, Any]:
    """The values that fit the fields of `cls`, converted (lists to tuples, 1 to 1.0); adds the rest to `problems`.

    stage_keys: keys that a stage has besides the options, for suggestions.
    folders: where relative paths start from, by key such as `weights`; without one, in the working folder. A field
        `Path` takes text as an absolute path; `Path | str` takes the path of what exists, and other text as a name.
    Raises PluginError for a class whose fields cannot be checked.
    """
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    try:
        hints = get_type_hints(cls)
    except Exception as error:
        raise PluginError(f"the field types of {cls.__qualname__} cannot be read: {error}") from error
    names = (*stage_keys, *fields)
    for key in (key for key in values if key not in fields):
        hint = f"{did_you_mean(key, names)}known keys: {', '.join(names)}"
        problems.append(Problem(key, "unknown key", hint, unknown=True))
    for key, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and key not in values:
            problems.append(Problem(key, "is missing", f"give {describe(hints[key])}"))
    run = _Check(problems, folders or {})
    return {key: _fit(hints[key], values[key], key, run) for key in fields if key in values}


def describe(kind: Any) -> str:
    """A type as a message says it: `a whole number`, `a list of numbers`, `'layer', 'attention' or 'mlp'`."""
    if kind in WORDS:
        return WORDS[kind]
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        return _either([_yaml(arg) for arg in args])
    if origin in (Union, types.UnionType):
        return _either([describe(arg) for arg in args])
    if origin is tuple and not _is_run(args):
        return f"a list of {len(args)}: {', '.join(map(describe, args))}"
    if origin in (tuple, list, Sequence):
        return f"a list, each entry {describe(args[0])}"
    return "a mapping" if origin in (dict, Mapping) else "a value"


def _fit(kind: Any, value: Any, key: str, run: _Check) -> Any:
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        return _fit_union(kind, args, value, key, run)
    if origin is Literal:
        if any(value == arg and type(value) is type(arg) for arg in args):
            return value
        near = did_you_mean(str(value), map(str, args)).strip()
        return _wrong(kind, value, key, run, near)
    if origin in (tuple, list, Sequence):
        return _fit_list(kind, origin, args, value, key, run)
    if origin in (dict, Mapping) and args[0] is str:
        if not isinstance(value, Mapping):
            return _wrong(kind, value, key, run)
        return {name: _fit(args[1], item, f"{key}.{name}", run) for name, item in value.items()}
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value) if math.isfinite(value) else _wrong(kind, value, key, run, "it must be finite")
    if kind is Path and isinstance(value, str) and value:
        return Path(run.folders.get(key, Path()), os.path.expanduser(value)).absolute()
    if kind in WORDS:
        return value if type(value) is kind else _wrong(kind, value, key, run, _quoting(kind, value))
    raise PluginError(f"field '{key}' has type {kind}, which a pipeline file cannot hold")


def _fit_union(kind: Any, args: Sequence[Any], value: Any, key: str, run: _Check) -> Any:
    for arg in args:
        attempt = _Check([], run.folders)
        fitted = _fit(arg, value, key, attempt)
        if not attempt.problems and not (str in args and isinstance(fitted, Path) and not os.path.exists(fitted)):
            return fitted
    others = [arg for arg in args if arg is not type(None)]
    if len(others) == 1 and value is not None:  # an optional field: its own message says more
        return _fit(others[0], value, key, run)
    return _wrong(kind, value, key, run)


def _fit_list(kind: Any, origin: Any, args: Sequence[Any], value: Any, key: str, run: _Check) -> Any:
    if isinstance(value, str) or not isinstance(value, Sequence):
        return _wrong(kind, value, key, run, _listing(args[0], value, key, run))
    if origin is tuple and not _is_run(args):
        if len(value) != len(args):
            run.problems.append(Problem(key, f"must have {len(args)} entries, not {len(value)}"))
            return ()
        kinds = list(args)
    else:
        kinds = [args[0]] * len(value)
    items = (_fit(one, item, f"{key}[{i}]", run) for i, (one, item) in enumerate(zip(kinds, value, strict=True)))
    return list(items) if origin is list else tuple(items)


def _listing(kind: Any, value: Any, key: str, run: _Check) -> str:
    """How to write as a list what stands where a list is needed: one entry, or a range of numbers."""
    if kind is int and isinstance(value, str) and (every := meant.numbers(value)):
        return every
    attempt = _Check([], run.folders)
    _fit(kind, value, key, attempt)
    return "" if attempt.problems else f"write [{_yaml(value)}]"


def _is_run(args: Sequence[Any]) -> bool:
    return len(args) == 2 and args[1] is Ellipsis


def _wrong(kind: Any, value: Any, key: str, run: _Check, hint: str = "") -> None:
    run.problems.append(Problem(key, f"must be {describe(kind)}, not {_yaml(value)}", hint))


def _quoting(kind: Any, value: Any) -> str:
    if kind is bool and isinstance(value, str) and value.casefold() in ("yes", "no", "on", "off"):
        return "write true or false"
    if kind is int and (hint := meant.whole(value) or (meant.numbers(value, True) if isinstance(value, str) else "")):
        return hint
    if isinstance(value, str) and kind in (int, float, bool):
        return meant.fraction(value) if kind is float else "remove the quotes" if value[:1].isdigit() else ""
    return "put it in quotes" if kind is str and isinstance(value, int | float) else ""


def _either(words: Sequence[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _yaml(value: Any) -> str:
    """A value as the file holds it, shortened."""
    if value is None or isinstance(value, bool):
        return {None: "nothing", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "a list"
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
