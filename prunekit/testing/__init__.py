"""For authors of strategies: the contract as a test class, tiny models, a tiny checkpoint, the masked reference.

Names are loaded when first used: the pytest plugin of this package is read before anything else is.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prunekit.testing.check import ContractFailure
    from prunekit.testing.checkpoint import save_tiny_model
    from prunekit.testing.contract import StrategyContract
    from prunekit.testing.tiny import tiny_inputs, tiny_llava
    from prunekit.verify.equivalence import assert_equivalent

_WHERE = {
    "ContractFailure": "testing.check",
    "StrategyContract": "testing.contract",
    "assert_equivalent": "verify.equivalence",
    "save_tiny_model": "testing.checkpoint",
    "tiny_inputs": "testing.tiny",
    "tiny_llava": "testing.tiny",
}

__all__ = [
    "ContractFailure", "StrategyContract", "assert_equivalent", "save_tiny_model", "tiny_inputs", "tiny_llava",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'prunekit.testing' has no attribute {name!r}")
    return getattr(importlib.import_module(f"prunekit.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
