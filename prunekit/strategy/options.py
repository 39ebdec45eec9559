"""Checks the options of a stage against the fields of its strategy's dataclass: no coercion, every problem at once."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from prunekit.errors import PluginError, did_you_mean

# Keys that every stage of a pipeline file may have, whatever its strategy; no option has such a name.
STAGE_KEYS = ("use", "at", "keep", "keep_tokens", "keep_of", "keep_layers")
BUDGETS = ("keep", "keep_tokens", "keep_of")


@dataclasses.dataclass(frozen=True)
class Problem:
    """One wrong option: `key` is a path below the stage, such as `layers[2]`; `unknown`: the key itself is wrong."""

    key: str
    message: str
    hint: str = ""
    unknown: bool = False


def check(
    cls: type[Any], values: Mapping[str, Any], stage_keys: Sequence[str], problems: list[Problem]
) -> dict[str, Any]:
    """The values that fit the fields of `cls`, converted (lists to tuples, 1 to 1.0); adds the rest to `problems`.

    stage_keys: keys that a stage has besides the options, for suggestions. Raises PluginError for a class whose fields
    cannot be checked.
    """
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    try:
        hints = get_type_hints(cls)
    except Exception as error:
        raise PluginError(f"the field types of {cls.__qualname__} cannot be read: {error}") from error
    known = (*stage_keys, *fields)
    for key in (key for key in values if key not in fields):
        hint = f"{did_you_mean(key, known)}known keys: {', '.join(known)}"
        problems.append(Problem(key, "unknown key", hint, unknown=True))
    for key, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and key not in values:
            problems.append(Problem(key, "is missing", f"give {describe(hints[key])}"))
    return {key: _fit(hints[key], values[key], key, problems) for key in fields if key in values}


def describe(kind: Any) -> str:
    """A type as a message says it: `a whole number`, `a list of numbers`, `'layer', 'attention' or 'mlp'`."""
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "nothing"}
    if kind in words:
        return words[kind]
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


def _fit(kind: Any, value: Any, key: str, problems: list[Problem]) -> Any:
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        return _fit_union(kind, args, value, key, problems)
    if origin is Literal:
        if any(value == arg and type(value) is type(arg) for arg in args):
            return value
        near = did_you_mean(str(value), map(str, args)).strip()
        return _wrong(kind, value, key, problems, near)
    if origin in (tuple, list, Sequence):
        return _fit_list(kind, origin, args, value, key, problems)
    if origin in (dict, Mapping) and args[0] is str:
        if not isinstance(value, Mapping):
            return _wrong(kind, value, key, problems)
        return {name: _fit(args[1], item, f"{key}.{name}", problems) for name, item in value.items()}
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value) if math.isfinite(value) else _wrong(kind, value, key, problems, "it must be finite")
    if kind in (int, float, str, bool, type(None)):
        return value if type(value) is kind else _wrong(kind, value, key, problems, _quoting(kind, value))
    raise PluginError(f"field '{key}' has type {kind}, which a pipeline file cannot hold")


def _fit_union(kind: Any, args: Sequence[Any], value: Any, key: str, problems: list[Problem]) -> Any:
    for arg in args:
        found: list[Problem] = []
        fitted = _fit(arg, value, key, found)
        if not found:
            return fitted
    others = [arg for arg in args if arg is not type(None)]
    if len(others) == 1 and value is not None:  # an optional field: its own message says more
        return _fit(others[0], value, key, problems)
    return _wrong(kind, value, key, problems)


def _fit_list(kind: Any, origin: Any, args: Sequence[Any], value: Any, key: str, problems: list[Problem]) -> Any:
    if isinstance(value, str) or not isinstance(value, Sequence):
        hint = f"write [{_yaml(value)}]" if isinstance(value, int | float | str) else ""
        return _wrong(kind, value, key, problems, hint)
    if origin is tuple and not _is_run(args):
        if len(value) != len(args):
            problems.append(Problem(key, f"must have {len(args)} entries, not {len(value)}"))
            return ()
        kinds = list(args)
    else:
        kinds = [args[0]] * len(value)
    items = (_fit(one, item, f"{key}[{i}]", problems) for i, (one, item) in enumerate(zip(kinds, value, strict=True)))
    return list(items) if origin is list else tuple(items)


def _is_run(args: Sequence[Any]) -> bool:
    return len(args) == 2 and args[1] is Ellipsis


def _wrong(kind: Any, value: Any, key: str, problems: list[Problem], hint: str = "") -> None:
    problems.append(Problem(key, f"must be {describe(kind)}, not {_yaml(value)}", hint))


def _quoting(kind: Any, value: Any) -> str:
    if kind is bool and isinstance(value, str) and value.casefold() in ("yes", "no", "on", "off"):
        return "write true or false"
    if isinstance(value, str) and kind in (int, float, bool):
        return "remove the quotes" if value[:1].isdigit() else ""
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
