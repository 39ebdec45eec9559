"""The seeds that a pipeline draws with, off its canonical form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

SEED = "seed"  # the option whose value makes no other pipeline, only another draw of it


def seeds(data: Any) -> Iterator[int]:
    """Those of all its stages, in their order; a stage with `seed: null` draws nothing. data: what its YAML holds."""
    inside = data.values() if isinstance(data, Mapping) else data if isinstance(data, list) else ()
    if isinstance(data, Mapping) and isinstance(data.get(SEED), int):
        yield data[SEED]
    for one in inside:
        yield from seeds(one)
