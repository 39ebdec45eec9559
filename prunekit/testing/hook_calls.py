"""Watching the hook calls of a pipeline's stages, by pluggy's own means."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from prunekit.pipeline.build import Pipeline

Before = Callable[[str, dict[str, Any]], None]
After = Callable[[str, dict[str, Any], Any], None]


@contextmanager
def watched(pipeline: Pipeline, before: Before | None = None, after: After | None = None) -> Iterator[None]:
    """While open, `before` is told of the hook and the arguments of every call, `after` also of the answer.

    Arguments that nobody asked for are left out. A call whose hook raised has no `after`.
    """

    def start(hook: str, methods: Any, arguments: Any) -> None:
        if before is not None and methods:
            before(hook, _asked(arguments))

    def end(outcome: Any, hook: str, methods: Any, arguments: Any) -> None:
        if after is not None and methods and outcome.exception is None:
            after(hook, _asked(arguments), outcome.get_result())

    with ExitStack() as stack:
        for stage in pipeline.stages:
            stack.callback(stage.manager.add_hookcall_monitoring(start, end))
        yield


def _asked(arguments: Any) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if value is not None}
