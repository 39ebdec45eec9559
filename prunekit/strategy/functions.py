"""Functions that a declaration may hold in place of a value: whether they can be called as they will be."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from prunekit.errors import did_you_mean


def unfit(function: Callable[..., Any], given: Sequence[str], named: Sequence[str] = ()) -> str:
    """Why `function` cannot be called with one positional argument for each of `given`; empty: it can.

    given: what they are, for people, such as ("the strategy", "the number of decoder layers"). named: arguments that it
    gets by name where it names them.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of a builtin nothing is known
        return ""
    asked = {name: None for name in named if name in signature.parameters}
    try:
        signature.bind(*given, **asked)
    except TypeError:
        strangers = [name for name in signature.parameters if name not in named][len(given) :]
        near = next(filter(None, (did_you_mean(name, named) for name in strangers)), "")
        also = f", and gets {', '.join(f'`{name}`' for name in named)} where it names that" if named else ""
        takes = ", ".join(signature.parameters)
        return f"its function takes ({takes}); {near}it is called with {' and '.join(given)}{also}"
    return ""
