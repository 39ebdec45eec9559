"""The contract as a pytest plugin: no test file is needed.

    pytest -p prunekit.testing.pytest_plugin --strategy corner

or in pyproject.toml, so that `pytest` alone does it:

    [tool.pytest.ini_options]
    addopts = "-p prunekit.testing.pytest_plugin"
    strategies = ["corner"]

Each rule of each named strategy is a test of its own, beside those of the test files. Options that a strategy needs
belong into a subclass of `StrategyContract`. The fixture `tiny_checkpoint` is the folder of a complete tiny model.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--strategy NAME`, several times if wanted, and `strategies` in the configuration."""
    group = parser.getgroup("prunekit")
    about = "hold this registered strategy to prunekit's contract; may be given several times"
    group.addoption("--strategy", action="append", default=[], metavar="NAME", help=about)
    parser.addini("strategies", "registered strategies that are held to prunekit's contract", "linelist", [])


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    """Add a test for each rule of each named strategy. Raises UsageError for a name that nothing registered."""
    named = dict.fromkeys([*config.getini("strategies"), *config.getoption("--strategy")])
    for use in named:
        items.extend(_rules(session, use))


def _rules(session: pytest.Session, use: str) -> Iterator[pytest.Item]:
    from prunekit.errors import PrunekitError
    from prunekit.testing.contract import contract

    try:
        made = contract(use)
        rules = made.rules()
    except PrunekitError as error:
        raise pytest.UsageError(str(error)) from error
    for rule in rules:
        yield RuleItem.from_parent(session, name=f"contract of {use}[{rule.name}]", made=made, rule=rule)


class RuleItem(pytest.Item):
    """One rule that one strategy is held to."""

    def __init__(self, made: Any, rule: Any, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.made, self.rule = made, rule

    def runtest(self) -> None:
        self.made().hold(self.rule)

    def repr_failure(self, excinfo: Any, style: Any = None) -> Any:
        """The text of the failure, without the frames of this package."""
        from prunekit.testing.check import ContractFailure

        return str(excinfo.value) if excinfo.errisinstance(ContractFailure) else super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, None, str]:
        return self.path, None, self.name


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a complete tiny model, as `prunekit.testing.save_tiny_model` writes it."""
    from prunekit.testing.checkpoint import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("prunekit") / "tiny")
