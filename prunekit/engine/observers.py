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
    for observer in hooks.prunekit_tokens_pruned.get_hookimpls():
        for event in report().events:
            _tell(observer, event)
    for observer in hooks.prunekit_run_finished.get_hookimpls():
        _tell(observer, report())


def _tell(observer: Any, item: object) -> None:
    try:
        observer.function(*(item for _ in observer.argnames))
    except Exception as error:
        message = f"observer '{observer.plugin_name}' failed: {type(error).__name__}: {error}"
        warnings.warn(message, PrunekitWarning, stacklevel=2)
