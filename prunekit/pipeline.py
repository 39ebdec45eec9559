"""From a pipeline file to bound stages: `build` checks it against the registry, `Pipeline.bind` against a model."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from prunekit import plugins, spec
from prunekit.decisions import LayerAction, LayerPlan, ModelShape
from prunekit.errors import Fault, PluginError, PrunekitError, SpecError
from prunekit.registry import Registry
from prunekit.sites import Site
from prunekit.stage import Stage, make, named_problem

__all__ = ["BoundPipeline", "Pipeline", "Stage", "build"]

WITHOUT_ATTENTION = frozenset({LayerAction.SKIP, LayerAction.SKIP_ATTENTION})


@dataclass(frozen=True)
class Pipeline:
    """Stages that are ready to meet a model.

    source: the file, `<inline>` or `<dict>`. resolved: canonical YAML with every default filled in.
    sha: 16 hex digits of `resolved`, prunekit's version and the versions of the distributions of its strategies.
    """

    name: str
    stages: tuple[Stage, ...]
    source: str
    resolved: str
    sha: str

    def bind(self, shape: ModelShape) -> BoundPipeline:
        """The pipeline on a model with these numbers. Raises SpecError with everything that does not fit."""
        faults: list[Fault] = []
        placed = tuple(
            (stage.site if stage.site is not None else stage.sites.resolve(shape.layers), stage)
            for stage in self.stages
            if stage.is_token
        )
        faults += _site_faults(placed, shape)
        faults += _order_faults(placed)
        faults += _budget_faults(placed, shape.visual_tokens)
        plan = _plan(self.stages, shape, faults)
        faults += _attention_faults(placed, plan)
        if faults:
            raise SpecError(_sorted(faults))
        return BoundPipeline(self, shape, placed, plan)

    def __str__(self) -> str:
        return f"# {self.sha}\n{self.resolved}"


@dataclass(frozen=True)
class BoundPipeline:
    """A pipeline on a model: its token stages in site order, and what becomes of each decoder layer."""

    pipeline: Pipeline
    shape: ModelShape
    token_stages: tuple[tuple[Site, Stage], ...]
    plan: LayerPlan


def build(
    source: str | Path | Mapping[str, Any], overrides: Sequence[str] = (), registry: Registry | None = None
) -> Pipeline:
    """Read and check a pipeline: a path, a dict, or YAML or JSON text.

    overrides: `key=value` texts such as `stages[0].keep=0.3`. registry: None takes what the installed plugins register.
    Raises SpecError with every fault of the file, PluginError when a plugin is broken.
    """
    read, found = spec.read(source, overrides)
    faults = list(found)
    registry = plugins.registry() if registry is None else registry
    made = [make(index, one, registry, faults) for index, one in enumerate(read.stages) if one.use]
    stages = tuple(stage for stage in made if stage is not None)
    # What can be seen without a model; `bind` looks again once defaults that scale with the depth are places.
    placed = [(site, stage) for stage in stages if stage.is_token and (site := stage.known_site) is not None]
    faults += [*_order_faults(placed), *_budget_faults(placed, None)]
    if faults:
        raise SpecError(_sorted(faults))
    resolved = _resolved(read.name, stages)
    return Pipeline(read.name, stages, read.source, resolved, _sha(resolved, stages))


def _sorted(faults: Sequence[Fault]) -> list[Fault]:
    """By place in the file; those without a place first, in the order found."""
    return sorted(faults, key=lambda one: (one.where.file, one.where.line, one.where.col) if one.where else ("", 0, 0))


def _resolved(name: str, stages: Sequence[Stage]) -> str:
    return yaml.safe_dump({"name": name, "stages": [_stage_data(stage) for stage in stages]}, sort_keys=False)


def _stage_data(stage: Stage) -> dict[str, Any]:
    data: dict[str, Any] = {"use": stage.use}
    if stage.is_token and (site := stage.known_site) is not None:
        data["at"] = "encoder" if site.layer is None else site.layer
    if stage.keep and stage.keep.tokens is not None:
        data["keep_tokens"] = stage.keep.tokens
    elif stage.keep:
        data["keep"] = stage.keep.fraction
        if stage.keep.of != "original":
            data["keep_of"] = stage.keep.of
    for field in dataclasses.fields(stage.strategy):
        if field.init:
            data[field.name] = _plain(getattr(stage.strategy, field.name))
    return data


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _sha(resolved: str, stages: Sequence[Stage]) -> str:
    from prunekit import __version__

    parts = [resolved, f"prunekit {__version__}", *sorted({stage.origin for stage in stages})]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _site_faults(placed: Sequence[tuple[Site, Stage]], shape: ModelShape) -> Iterator[Fault]:
    for site, stage in placed:
        if site.layer is not None and site.layer >= shape.layers:
            message = f"there is no layer {site.layer}: the model has layers 0 to {shape.layers - 1}"
            yield stage.fault("at", message, "name an earlier layer")
        elif reason := stage.sites.reason_against(site):
            yield stage.fault("at", f"'{stage.use}' cannot act at '{site}': it {reason}")
        elif stage.asks_for("attention") and site.depth < 1:
            message = f"'{stage.use}' reads the attention of the layer before, and none has run at '{site}'"
            yield stage.fault("at", message, "name layer 1 or later")


def _order_faults(placed: Sequence[tuple[Site, Stage]]) -> Iterator[Fault]:
    for (before, earlier), (site, stage) in itertools.pairwise(placed):
        if site < before:
            message = f"stages are out of order: '{stage.use}' at '{site}' stands after '{earlier.use}' at '{before}'"
            yield stage.fault("at", message, "list stages in the order in which the data passes them")
    for index, (_, stage) in enumerate(placed):
        if blind := next((earlier for _, earlier in placed[:index] if earlier.drops_all), None):
            yield stage.fault("use", f"'{blind.use}' before it leaves no visual tokens", "remove one of the two stages")


def _budget_faults(placed: Sequence[tuple[Site, Stage]], visual: int | None) -> Iterator[Fault]:
    """Stages with a fixed count that ask for more than there is, or than an earlier one leaves."""
    fixed = [stage for _, stage in placed if stage.keep and stage.keep.of == "original"]
    for index, stage in enumerate(fixed):
        if visual is not None and stage.keep and (stage.keep.tokens or 0) > visual:
            message = f"asks for {stage.keep.tokens} of the {visual} visual tokens that this model has per image"
            yield stage.fault("keep_tokens", message, f"name at most {visual}, or a fraction with `keep`")
            continue
        for earlier in fixed[:index]:
            if _asks_more(stage, earlier, visual):
                key = "keep" if stage.keep and stage.keep.tokens is None else "keep_tokens"
                message = f"asks for {stage.keep}, but {earlier.label} leaves only {earlier.keep}"
                yield stage.fault(key, message, "keep less here or more there")
                break


def _asks_more(stage: Stage, earlier: Stage, visual: int | None) -> bool:
    """For certain, whatever the prompt; a fraction and a number are compared on one image, if its tokens are known."""
    new, old = stage.keep, earlier.keep
    if new is None or old is None:
        return False
    if new.fraction is not None and old.fraction is not None:
        return new.fraction > old.fraction
    if new.tokens is not None and old.tokens is not None:
        return new.tokens > old.tokens
    return visual is not None and new.count(visual, visual) > old.count(visual, visual)


def _plan(stages: Sequence[Stage], shape: ModelShape, faults: list[Fault]) -> LayerPlan:
    """The plans of all layer stages together."""
    plan = LayerPlan()
    for stage in stages:
        if not stage.is_layer:
            continue
        own = _plan_of(stage, shape, faults)
        beyond = sorted(layer for layer in own.actions if layer not in range(shape.layers))
        if beyond:
            message = f"plans layers {beyond}, but the model has layers 0 to {shape.layers - 1}"
            faults.append(stage.fault("layers", message))
            continue
        try:
            plan = plan.merge(own)
        except ValueError as error:
            faults.append(stage.fault("layers", f"plans disagree: {error}", "let one stage decide about each layer"))
    return plan


def _plan_of(stage: Stage, shape: ModelShape, faults: list[Fault]) -> LayerPlan:
    try:
        plan = stage.hook.plan_layers(shape=shape)
    except PrunekitError:
        raise
    except ValueError as error:
        problem = named_problem(type(stage.strategy), str(error))
        faults.append(stage.fault(problem.key, problem.message))
        return LayerPlan()
    except Exception as error:
        raise PluginError(
            f"{stage.label} from {stage.origin}: plan_layers failed with {type(error).__name__}: {error}"
        ) from error
    if not isinstance(plan, LayerPlan):
        raise PluginError(f"{stage.label} from {stage.origin}: plan_layers must return a LayerPlan, not {plan!r}")
    return plan


def _attention_faults(placed: Sequence[tuple[Site, Stage]], plan: LayerPlan) -> Iterator[Fault]:
    for site, stage in placed:
        if site.layer and stage.asks_for("attention") and plan[site.layer - 1] in WITHOUT_ATTENTION:
            message = f"'{stage.use}' reads the attention of layer {site.layer - 1}, which another stage skips"
            yield stage.fault("at", message, "move it, or let that layer run")
