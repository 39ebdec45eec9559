"""All that the author of a strategy meets: its declaration, sites, inputs, options and decisions.

The package can be called: `from prunekit import strategy` gives the decorator of `declare.py`, whether or not something
has imported this package before and so put it in the place of that name.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


class _Strategy(ModuleType):
    def __call__(self, **declared: Any) -> Callable[[type[Any]], type[Any]]:
        """As `prunekit.strategy.declare.strategy`."""
        from prunekit.strategy.declare import strategy

        return strategy(**declared)


sys.modules[__name__].__class__ = _Strategy
