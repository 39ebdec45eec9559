"""Instance-level overrides of module methods, and the stack that undoes them.

Nothing of a model is replaced: a function is put into the instance's `__dict__`, where Python finds it before the
class's method, and is taken out again. Classes, parameter names, configs and hooks stay as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from prunekit.engine.tracing import as_written
from prunekit.errors import PrunekitError

MARK = "__prunekit_override__"


class Overrides:
    """Puts overrides in, and takes them out in reverse order."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def replace(
        self,
        module: nn.Module,
        name: str,
        make: Callable[[Callable[..., Any]], Callable[..., Any]],
        traceable: bool = False,
    ) -> None:
        """Override `module.name` with `make(original)`.

        traceable: it knows by itself what to do under `torch.compile`; others are never traced.
        """
        original = getattr(module, name)
        earlier = module.__dict__.get(name)
        made = make(original) if traceable else as_written(make(original), original)
        override = functools.wraps(original)(made)
        setattr(override, MARK, True)
        module.__dict__[name] = override

        def undo() -> None:
            if module.__dict__.get(name) is not override:
                raise PrunekitError(
                    f"{type(module).__name__}.{name} was replaced while prunekit.apply was active; "
                    "undo what was put on top of it before leaving the `with` block"
                )
            if earlier is None:
                del module.__dict__[name]
            else:
                module.__dict__[name] = earlier

        self._undo.append(undo)

    def restore(self) -> None:
        """Undo everything, newest first. What can be undone is undone, then the first error is raised."""
        errors = []
        while self._undo:
            try:
                self._undo.pop()()
            except PrunekitError as error:
                errors.append(error)
        if errors:
            raise errors[0]


def is_overridden(module: nn.Module, name: str) -> bool:
    """Whether `module.name` is an override of ours."""
    return hasattr(module.__dict__.get(name), MARK)
