"""Which part of the contract runs always: every strategy meets every third rule, every rule every third strategy."""

from __future__ import annotations

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the rest of the contract of registered strategies as slow: `make test-full` runs it."""
    every = [item for item in items if item.path.name == "test_contract.py" and hasattr(item, "callspec")]
    strategies = sorted({item.cls.__name__ for item in every})
    rules = sorted({item.callspec.id for item in every})
    for item in every:
        if (strategies.index(item.cls.__name__) + rules.index(item.callspec.id)) % 3:
            item.add_marker(pytest.mark.slow)
