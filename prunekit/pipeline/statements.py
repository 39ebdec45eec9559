"""What a strategy may say beside its hooks: files that it rests on, models that it fits, layers to run, its own cost.

All are methods, and optional. Arguments: shape, the `ModelShape`; text, visual: tokens of one prompt.

    files() -> paths of files whose content decides what it does, such as trained weights
    check(shape) -> None; raises ValueError for a model that it cannot serve
    protected_layers(shape) -> numbers of decoder layers that a router lets run for every sample
    flops(shape, text, visual) -> what its own decision costs for one prompt that reaches it with so many tokens

A ValueError that begins with the name of a field and a colon is put at that field.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from prunekit.errors import Fault, PluginError, PrunekitError
from prunekit.pipeline.stage import Stage, named_problem
from prunekit.strategy.decisions import ModelShape


def file_faults(stages: Sequence[Stage]) -> Iterator[Fault]:
    """Files that strategies name and that cannot be read."""
    for stage in stages:
        try:
            for path in _files(stage):
                with path.open("rb"):
                    pass
        except OSError as error:
            yield stage.fault("", f"cannot read '{error.filename}': {error.strerror}", "is it complete?")
        except ValueError as error:
            yield _fault(stage, error)


def file_digests(stages: Sequence[Stage]) -> list[str]:
    """One line for each file that a stage rests on: its name and the hash of its content."""
    lines = []
    for stage in stages:
        for path in _files(stage):
            with path.open("rb") as file:
                lines.append(f"{stage.index} {path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}")
    return lines


def shape_faults(stages: Sequence[Stage], shape: ModelShape) -> Iterator[Fault]:
    """Strategies that do not fit a model with these numbers."""
    for stage in stages:
        try:
            _call(stage, "check", None, shape)
            _protected(stage, shape)
        except ValueError as error:
            yield _fault(stage, error)


def protected_layers(stages: Sequence[Stage], shape: ModelShape) -> frozenset[int]:
    """Layers that routers let run for every sample; none of a strategy that does not fit the model."""
    found: frozenset[int] = frozenset()
    for stage in stages:
        try:
            found |= _protected(stage, shape)
        except ValueError:
            continue  # told by `shape_faults`
    return found


def selection_flops(stage: Stage, shape: ModelShape, text: int, visual: int) -> int:
    """What a stage's own decision costs for one prompt; 0 for a strategy that does not say."""
    found = _call(stage, "flops", 0, shape, text, visual)
    if not isinstance(found, int) or found < 0:
        raise PluginError(f"{stage.label} from {stage.origin}: flops must return a whole number, not {found!r}")
    return found


def _files(stage: Stage) -> tuple[Path, ...]:
    """Those that the strategy names, and those that its options name."""
    options = (getattr(stage.strategy, field.name) for field in dataclasses.fields(stage.strategy))
    own = [value for value in options if isinstance(value, Path) and value.is_file()]
    return tuple(dict.fromkeys([*(Path(path) for path in _call(stage, "files", ())), *own]))


def _protected(stage: Stage, shape: ModelShape) -> frozenset[int]:
    found = frozenset(_call(stage, "protected_layers", (), shape)) if stage.is_router else frozenset()
    if any(layer not in range(shape.layers) for layer in found):
        raise PluginError(f"{stage.label} from {stage.origin}: protected_layers gave {sorted(found)}")
    return found


def _call(stage: Stage, method: str, otherwise: Any, *arguments: Any) -> Any:
    """What a method of the strategy says; `otherwise` where it has none."""
    function: Callable[..., Any] | None = getattr(stage.strategy, method, None)
    if function is None:
        return otherwise
    try:
        return function(*arguments)
    except (PrunekitError, ValueError, OSError):
        raise
    except Exception as error:
        raise PluginError(
            f"{stage.label} from {stage.origin}: {method} failed with {type(error).__name__}: {error}"
        ) from error


def _fault(stage: Stage, error: ValueError) -> Fault:
    problem = named_problem(type(stage.strategy), str(error))
    return stage.fault(problem.key, problem.message)
