"""Whether a record holds what its annotations say: a file from elsewhere may hold anything."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

PLAIN = (str, int, NoneType)
Check = Callable[[Any], str]  # where the value is not what it should be, and what it is; empty for a sound value


@cache
def check(hint: Any) -> Check:
    """A check for an annotation made of records, numbers, text, `Literal`, unions, tuples of any length and mappings.

    Numbers must be finite.
    """
    origin, inside = get_origin(hint), get_args(hint)
    if is_dataclass(hint):
        return _record(hint)
    if origin in (Union, UnionType):
        return _union(inside)
    if origin is tuple:
        return _each(tuple, enumerate, "[{}]", check(inside[0]))
    if origin is Literal:
        return lambda value: "" if value in inside else _told(value)
    if origin is not None and issubclass(dict, origin):
        return _each(Mapping, lambda value: value.items(), "[{!r}]", check(inside[1]))
    if hint is float:
        return lambda value: "" if _number(value) and abs(value) < math.inf else _told(value)  # not of NaN
    if hint is int:
        return lambda value: "" if _number(value) and isinstance(value, int) else _told(value)
    return lambda value: "" if isinstance(value, hint) else _told(value)


def _record(kind: Any) -> Check:
    hints = get_type_hints(kind)
    checks = [(field.name, _sound(hints[field.name]), check(hints[field.name])) for field in fields(kind)]

    def checked(value: Any) -> str:
        if not isinstance(value, kind):
            return _told(value)
        for name, sound, one in checks:
            item = getattr(value, name)
            if type(item) not in sound and (wrong := one(item)):
                return f".{name}{wrong}"
        return ""

    return checked


def _sound(hint: Any) -> frozenset[Any]:
    """Types by which alone a value is sound: text, whole numbers and None, of which a file has a hundred thousand."""
    inside = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return frozenset(one for one in inside if one in PLAIN)


def _union(inside: tuple[Any, ...]) -> Check:
    checks = [check(one) for one in inside if one is not NoneType]
    optional = NoneType in inside
    if optional and len(checks) == 1:
        (only,) = checks
        return lambda value: "" if value is None else only(value)

    def checked(value: Any) -> str:
        if value is None and optional:
            return ""
        found = [one(value) for one in checks]
        return "" if "" in found else found[0]

    return checked


def _each(kind: type, items: Callable[[Any], Any], place: str, one: Check) -> Check:
    def checked(value: Any) -> str:
        if not isinstance(value, kind):
            return _told(value)
        return next((place.format(key) + wrong for key, item in items(value) if (wrong := one(item))), "")

    return checked


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _told(value: Any) -> str:
    text = repr(value)
    return f" is {text if len(text) <= 60 else text[:57] + '...'}"
