"""Telling observers what happened. They get frozen data, and one that raises hurts no run."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from prunekit import plugins
from prunekit.errors import PrunekitWarning
from prunekit.records import RunReport


def tell(report: Callable[[], RunReport]) -> None:
    """Tell every observer of this process about a finished prefill. Without observers, no report is made."""
    hooks = plugins.manager().hook
    for name in _observers(hooks.prunekit_tokens_pruned):
        for event in report().events:
            _tell(name, "prunekit_tokens_pruned", event=event)
    for name in _observers(hooks.prunekit_run_finished):
        _tell(name, "prunekit_run_finished", report=report())


def _observers(hook: Any) -> list[str]:
    """The plugins that implement it, or wrap their own implementation, once each."""
    return list(dict.fromkeys(one.plugin_name for one in hook.get_hookimpls()))


def _tell(name: str, hook: str, **item: object) -> None:
    try:
        plugins.only(name, hook)(**item)
    except Exception as error:
        message = f"observer '{name}' failed: {type(error).__name__}: {error}"
        warnings.warn(message, PrunekitWarning, stacklevel=2)
