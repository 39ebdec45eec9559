"""Whose calls a block is for: those of the thread or task that opened it, and of what was started inside of it.

A block is on the model, which every thread of the process may call. Tasks of asyncio carry the context that they were
made in, and so the blocks that are open there; threads start with an empty one, so that `Thread.start` hands these on
for as long as a block is open.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from prunekit.engine.patches import Patch
from prunekit.errors import Unsupported

_INHERITED = "_prunekit_blocks"


class Callers:
    """Whoever may call a model inside one block. shared: everybody."""

    def __init__(self, shared: bool = False) -> None:
        self.shared = shared
        self.is_open = False

    def open(self) -> None:
        """From here on the current context, and whatever is started in it, is among the callers."""
        _starting.__enter__()
        self.is_open = True
        _OPEN.set(_open_here() | {self})

    def close(self) -> None:
        """Nobody is any more. It may be called again, and from elsewhere."""
        if self.is_open:
            self.is_open = False
            _starting.__exit__()
            _OPEN.set(_OPEN.get() - {self})

    @property
    def include_current(self) -> bool:
        """Whether the thread and task that asks is among them."""
        return self.shared or self in _OPEN.get() or self in _inherited()

    def check_call(self) -> None:
        """Raise Unsupported for a call of the model by somebody else."""
        if not self.include_current:
            raise Unsupported(
                "this call comes from outside of the prunekit.apply block that another thread or task has opened on "
                "this model, and would be pruned by it; start the thread inside the block, hand it the block's context "
                "(asyncio.to_thread, contextvars.copy_context().run), open the block with shared=True, or wait for its "
                "end"
            )

    def check_block(self) -> None:
        """Raise Unsupported for a further block on the model that somebody else opens."""
        if not self.include_current:
            raise Unsupported(
                "another thread or task has a prunekit.apply block open on this model, whose stages would act here as "
                "well; take turns, give each a model of its own, or open one block for all: apply(..., shared=True)"
            )


# Blocks that are open in this context. Contexts that were copied from it may outlive them.
_OPEN: ContextVar[frozenset[Callers]] = ContextVar("prunekit_blocks", default=frozenset())


def _inherited() -> frozenset[Callers]:
    """Blocks that were open where this thread was started."""
    blocks: frozenset[Callers] = getattr(threading.current_thread(), _INHERITED, frozenset())
    return blocks


def _open_here() -> frozenset[Callers]:
    return frozenset(block for block in _OPEN.get() | _inherited() if block.is_open)


def _handing_on(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def start(self: threading.Thread, *args: Any, **kwargs: Any) -> Any:
        if blocks := _open_here():
            setattr(self, _INHERITED, blocks)
        return original(self, *args, **kwargs)

    return start


_starting = Patch(threading.Thread, "start", _handing_on)
