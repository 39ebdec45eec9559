"""Parts of layers that add nothing to the residual for a while, so that the other part's result is seen alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without(muted: set[str], part: str) -> Iterator[None]:
    """Within the block `part`, "attention" or "mlp", is in `muted`, which hooks on those parts look at."""
    muted.add(part)
    try:
        yield
    finally:
        muted.remove(part)
