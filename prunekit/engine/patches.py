"""A method of a class that stands in for the original while somebody needs it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


class Patch:
    """A block within which `owner.name` is `make(original)`, in all threads: of several at once the last one ends it.

    What somebody else has put on top meanwhile stays; the function beneath it must be harmless when nobody needs it.
    """

    def __init__(self, owner: type, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        self.owner, self.name, self.make = owner, name, make
        self._lock, self._users = threading.Lock(), 0
        self._original: Callable[..., Any] | None = None
        self._ours: Callable[..., Any] | None = None

    def __enter__(self) -> None:
        with self._lock:
            if self._users == 0:
                original: Callable[..., Any] = self.owner.__dict__[self.name]
                self._original, self._ours = original, self.make(original)
                setattr(self.owner, self.name, self._ours)
            self._users += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0 and self.owner.__dict__.get(self.name) is self._ours:
                setattr(self.owner, self.name, self._original)
