"""The seeds that a pipeline draws with, off its canonical form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

SEED = "seed"  # the option whose value makes no other pipeline, only another draw of it


def seeds(data: Any) -> Iterator[Any]:
    """Those of all its stages, in their order. data: what its YAML holds."""
    inside = data.values() if isinstance(data, Mapping) else data if isinstance(data, list) else ()
    if isinstance(data, Mapping) and SEED in data:
        yield data[SEED]
    for one in inside:
        yield from seeds(one)
