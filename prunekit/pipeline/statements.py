"""What the strategies of a pipeline state beside their decisions; the hooks are `StatementHooks`."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from prunekit.errors import Fault, PluginError, PrunekitError
from prunekit.pipeline.stage import Stage, named_problem
from prunekit.strategy.decisions import ModelShape


def file_faults(stages: Sequence[Stage]) -> Iterator[Fault]:
    """Files that strategies name and that cannot be read."""
    for stage in stages:
        missing = {name: path for name, path in _options(stage).items() if not path.exists()}
        for name, path in missing.items():
            yield stage.fault(name, f"no such file: '{path}'", "a relative path begins at the pipeline's own folder")
        try:
            for path in () if missing else _files(stage):
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
            _state(stage, "check", shape=shape)
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
    flops = _state(stage, "flops", shape=shape, text=text, visual=visual)
    if flops is None:
        return 0
    if isinstance(flops, bool) or not isinstance(flops, int) or flops < 0:
        raise PluginError(f"{stage.label} from {stage.origin}: flops must return a whole number, not {flops!r}")
    return flops


def _files(stage: Stage) -> tuple[Path, ...]:
    return (*(Path(path) for path in _state(stage, "files") or ()), *_options(stage).values())


def _options(stage: Stage) -> dict[str, Path]:
    """The files that its options name, by option."""
    values = ((one.name, getattr(stage.strategy, one.name)) for one in dataclasses.fields(stage.strategy))
    return {name: value for name, value in values if isinstance(value, Path) and not value.is_dir()}


def _protected(stage: Stage, shape: ModelShape) -> frozenset[int]:
    layers = frozenset(_state(stage, "protected_layers", shape=shape) or ()) if stage.is_router else frozenset()
    if any(layer not in range(shape.layers) for layer in layers):
        raise PluginError(f"{stage.label} from {stage.origin}: protected_layers gave {sorted(layers)}")
    return layers


def _state(stage: Stage, statement: str, **arguments: Any) -> Any:
    """What a strategy states; None where it does not."""
    if not stage.states(statement):
        return None
    try:
        return getattr(stage.hook, statement)(**arguments)
    except (PrunekitError, ValueError, OSError):
        raise
    except Exception as error:
        raise PluginError(
            f"{stage.label} from {stage.origin}: {statement} failed with {type(error).__name__}: {error}"
        ) from error


def _fault(stage: Stage, error: ValueError) -> Fault:
    problem = named_problem(type(stage.strategy), str(error))
    return stage.fault(problem.key, problem.message)
