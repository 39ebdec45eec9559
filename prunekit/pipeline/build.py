"""From a pipeline file to bound stages: `build` checks it against the registry, `Pipeline.bind` against a model."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from prunekit import plugins, version
from prunekit.errors import Fault, SpecError, UnknownName, Unsupported
from prunekit.pipeline import budget, cuts, layer_plans, risk, statements
from prunekit.pipeline.bound import BoundPipeline
from prunekit.pipeline.cut import Cut
from prunekit.pipeline.site_faults import site_faults
from prunekit.pipeline.stage import Stage, make
from prunekit.registry import NAME, Registry
from prunekit.spec import schema
from prunekit.spec.budget_keys import Budget
from prunekit.spec.compose import Source
from prunekit.spec.risk_keys import RiskBudget
from prunekit.spec.writing import to_yaml
from prunekit.strategy.decisions import MASKED, ModelShape
from prunekit.strategy.sites import ENCODER, Keep, Site

__all__ = ["BoundPipeline", "Cut", "Pipeline", "Stage", "build", "file_of"]
SUFFIXES = {".yaml", ".yml", ".json"}  # what ends so is a file, never a name


@dataclass(frozen=True)
class Pipeline:
    """Stages that are ready to meet a model.

    source: the file, `<inline>` or `<dict>`. resolved: canonical YAML with every default filled in.
    sha: 16 hex digits of `resolved` with the mere names of paths, prunekit's version, the versions of the distributions
        of its strategies, and the files that they rest on.
    description: as the file has it; it is not in the hash.
    positions: of the tokens that stay: `keep` the original ones, or `renumber` them without gaps.
    budget: what the stages that are left open may keep together, or what they may harm; None: there is none.
    base: as `sha`, without name, risk, confidence and calibration: what a calibration of its risk belongs to; empty:
        it has no budget of risk.
    """

    name: str
    stages: tuple[Stage, ...]
    source: str
    resolved: str
    sha: str
    positions: Literal["keep", "renumber"] = "keep"
    budget: Budget | RiskBudget | None = None
    description: str = ""
    base: str = ""

    def bind(self, shape: ModelShape) -> BoundPipeline:
        """The pipeline on a model with these numbers; what is accepted here, `apply` accepts.

        Raises SpecError with everything that does not fit, Unsupported for a model that no pipeline can prune.
        """
        if isinstance(self.budget, RiskBudget):
            return risk.with_ladder(self.budget, self._bound_rungs(self.budget, shape), self.base, self.source)
        faults: list[Fault] = []
        placed = cuts.on_tower(cuts.cuts_of(self.stages, shape.layers, shape.tower_depth), shape.tower)
        faults += site_faults(self.stages, placed, shape)
        faults += cuts.sequence_faults(self.stages, placed, shape.visual_tokens)
        plan = layer_plans.static_plan(self.stages, shape, faults)
        faults += statements.shape_faults(self.stages, shape)
        protected = cuts.protected_layers(placed, shape.layers) | statements.protected_layers(self.stages, shape)
        protected |= layer_plans.read_sources(plan, shape) | layer_plans.layers_before_routing(self.stages)
        faults += cuts.plan_faults(placed, plan, shape.layers)
        faults += layer_plans.routing_faults(self.stages, plan, protected, shape)
        faults += _positions_faults(self.positions, shape)
        if faults:
            raise SpecError(_sorted(faults))
        bound = BoundPipeline(self.name, self.sha, self.positions, self.stages, shape, placed, plan, protected)
        if bound.acts:
            _check_attention(shape)
        return bound if self.budget is None else budget.solved(bound, self.budget)

    def rungs(self) -> tuple[Pipeline, ...]:
        """Under a budget of risk the same pipeline on each rung, with a fixed budget; the first one keeps all."""
        assert isinstance(self.budget, RiskBudget), "only a budget of risk has a ladder"
        rungs = []
        for number, stage in enumerate(risk.rung_stages(self.stages[0], self.budget)):
            data = {"name": f"{self.name}-rung-{number}", **_positions_data(self.positions)}
            resolved, sha = _identity(data, (stage,))
            rungs.append(Pipeline(data["name"], (stage,), self.source, resolved, sha, self.positions))
        return tuple(rungs)

    def _bound_rungs(self, ladder: RiskBudget, shape: ModelShape) -> list[BoundPipeline]:
        """The rungs on a model. Faults of the first are those of the pipeline, of others those of their rung."""
        dense, *others = self.rungs()
        bound = [dataclasses.replace(dense.bind(shape), name=self.name, sha=self.sha)]
        for number, rung in enumerate(others):
            try:
                bound.append(rung.bind(shape))
            except SpecError as error:
                raise SpecError([ladder.fault(f"ladder[{number}]", one.message) for one in error.faults]) from error
        return bound

    def __str__(self) -> str:
        return f"# {self.sha}\n{self.resolved}"


def build(source: Source, overrides: Sequence[str] = (), registry: Registry | None = None) -> Pipeline:
    """Read and check a pipeline: a path, a registered name, YAML or JSON text, a dict, an OmegaConf container or a
    structured config.

    overrides: `key=value` texts such as `stages[0].keep=0.3`. registry: None takes what the installed plugins register.
    Raises SpecError with every fault of the file, PluginError when a plugin is broken.
    """
    registry = plugins.registry() if registry is None else registry
    read, early = schema.read(file_of(source, registry), overrides)
    faults: list[Fault] = []
    # A budget that cannot be read is one fault; stages that it leaves open are no others.
    budgeted = read.budget is not None or any(fault.key.partition(".")[0] == "budget" for fault in early)
    made = [make(index, one, registry, faults, budgeted) for index, one in enumerate(read.stages) if one.use]
    # A stage with a fault is compared with no other: where it acts and what it keeps may be another than it will be.
    stages = tuple(stage for stage in made if stage is not None and not any(map(stage.owns, early)))
    # What can be seen without a model; `bind` looks again once it knows the depth, with which defaults may scale.
    faults += cuts.sequence_faults(stages, cuts.cuts_of(stages, None), None)
    faults += layer_plans.rival_faults(stages)
    faults += statements.file_faults(stages)
    if isinstance(read.budget, RiskBudget) and len(stages) == len(read.stages):
        faults += risk.file_faults(stages, read.budget)
    faults = [*early, *read.resolution.judge(faults)]
    if faults:
        raise SpecError(_sorted(faults))
    data: dict[str, Any] = {"name": read.name, **_positions_data(read.positions)}
    base = ""
    if isinstance(read.budget, RiskBudget):
        _, base = _identity({**_positions_data(read.positions), "budget": read.budget.ladder_data()}, stages)
    if read.budget is not None:
        data["budget"] = read.budget.as_data()
    resolved, sha = _identity(data, stages)
    return Pipeline(read.name, stages, read.source, resolved, sha, read.positions, read.budget, read.description, base)


def _positions_data(positions: str) -> dict[str, Any]:
    return {} if positions == "keep" else {"positions": positions}


def _positions_faults(positions: str, shape: ModelShape) -> list[Fault]:
    if positions == "keep" or shape.rotary:
        return []
    if shape.opaque:
        message = f"this decoder can be cut at its input only: {shape.opaque}"
        return [Fault(None, "positions", message, "leave it out, or say keep")]
    message = f"the {shape.family} decoder has no rotary positions to renumber"
    return [Fault(None, "positions", message, "leave it out, or say keep")]


def _check_attention(shape: ModelShape) -> None:
    """Raise Unsupported for attention whose masks prunekit cannot cut."""
    if shape.attention not in MASKED and "flash" not in shape.attention:
        raise Unsupported(
            f"attention implementation '{shape.attention}' is not supported by this version; "
            "load the model with attn_implementation='sdpa', 'eager' or a flash attention"
        )


def file_of(source: Source, registry: Registry) -> Source:
    """The file of the pipeline that `source` names; a source that is no name, or a file of this name, as it is.

    Raises SpecError, with suggestions, for a name that is not registered.
    """
    if not isinstance(source, str) or not NAME.fullmatch(source) or Path(source).suffix in SUFFIXES:
        return source
    try:
        named = source in {entry.name for entry in registry.pipelines()}
        if Path(source).exists() and not (named and Path(source).is_dir()):
            return source  # a folder of the name, such as that of the plugin which brings it, is no pipeline
        return registry.get_pipeline(source)
    except OSError:
        return source  # too long for a name; whoever reads it says so
    except UnknownName as error:
        message = f"no such file: '{source}', and no pipeline of that name is registered"
        raise SpecError([Fault(None, "", message, error.hint)]) from error


def combine(outer: Pipeline, inner: Pipeline, shape: ModelShape) -> Pipeline:
    """One pipeline with the stages of both, in the order in which the data of a model with these numbers passes them.

    Raises SpecError when they do not agree about positions, or one has a budget for the whole.
    """
    if outer.positions != inner.positions:
        message = f"'{outer.name}' says {outer.positions}, '{inner.name}' inside it {inner.positions}"
        raise SpecError([Fault(None, "positions", message, "let both say the same")])
    if outer.budget is not None or inner.budget is not None:
        message = f"'{(outer if outer.budget else inner).name}' has one, which is for a whole pipeline"
        raise SpecError([Fault(None, "budget", message, "say with `keep` how much each stage leaves")])
    both = [*outer.stages, *inner.stages]
    placed = cuts.cuts_of(_numbered(both), shape.layers, shape.tower_depth)
    first = {cut.stage.index: cut.site for cut in reversed(placed)}
    order = sorted(_numbered(both), key=lambda stage: first.get(stage.index, Site(None, "pixels")))
    stages = _numbered(order)
    data = {"name": f"{outer.name}+{inner.name}", "positions": inner.positions}
    resolved, sha = _identity(data, stages)
    return Pipeline(data["name"], stages, inner.source, resolved, sha, inner.positions)


def _numbered(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    return tuple(dataclasses.replace(stage, index=index) for index, stage in enumerate(stages))


def _sorted(faults: Sequence[Fault]) -> list[Fault]:
    """By their position in the file; those without one first, in the order in which they were met."""
    return sorted(faults, key=lambda one: (one.where.file, one.where.line, one.where.col) if one.where else ("", 0, 0))


def _identity(data: Mapping[str, Any], stages: Sequence[Stage]) -> tuple[str, str]:
    """The resolved YAML of a pipeline, `data` beside its stages, and its hash.

    In the hash a path is its last name, and the content of the file: where a checkout lies changes nothing.
    """
    resolved = to_yaml(_file_data(data, stages, str))
    named = to_yaml(_file_data(data, stages, lambda path: path.name))
    origins = sorted({stage.origin for stage in stages})
    files = [*statements.file_digests(stages), *_calibration_digest(data)]
    parts = [named, f"prunekit {version.VERSION}", *origins, *files]
    return resolved, hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _file_data(data: Mapping[str, Any], stages: Sequence[Stage], path: Callable[[Path], str]) -> dict[str, Any]:
    plain: dict[str, Any] = _plain(data, path)
    return {**plain, "stages": [_stage_data(stage, path) for stage in stages]}


def _calibration_digest(data: Mapping[str, Any]) -> list[str]:
    """The content of a budget's calibration; nothing as long as there is none, which `bind` refuses."""
    path = data.get("budget", {}).get("calibration")
    return [] if path is None or not path.is_file() else [f"budget {hashlib.sha256(path.read_bytes()).hexdigest()}"]


def _stage_data(stage: Stage, path: Callable[[Path], str]) -> dict[str, Any]:
    """A stage as the file has it, with its defaults; `path` writes paths."""
    data: dict[str, Any] = {"use": stage.use}
    # A schedule brings sites and budgets together: without both the file takes it again.
    scheduled = stage.declaration.schedule is not None and not stage.sites_given
    if stage.cuts_tokens and not scheduled and (sites := stage.known_sites) is not None:
        data["at"] = _one_or_all([_site_data(site) for site in sites])
    data |= {} if stage.open else _budgets(stage.keeps)
    if stage.keep_layers:
        data["keep_layers"] = stage.keep_layers.tokens or stage.keep_layers.fraction
    if stage.route_at != ENCODER:
        data["route_at"] = _site_data(stage.route_at)
    for field in dataclasses.fields(stage.strategy):
        if field.init:
            data[field.name] = _plain(getattr(stage.strategy, field.name), path)
    return data


def _site_data(site: Site) -> int | str | None:
    return site.layer if site.in_decoder and site.point == "before" else str(site)


def _budgets(keeps: Sequence[Keep]) -> dict[str, Any]:
    if not keeps:
        return {}
    if keeps[0].tokens is not None:
        return {"keep_tokens": _one_or_all([keep.tokens for keep in keeps])}
    fractions = {"keep": _one_or_all([keep.fraction for keep in keeps])}
    return fractions if keeps[0].of == "original" else {**fractions, "keep_of": keeps[0].of}


def _one_or_all(values: list[Any]) -> Any:
    """A list of equal entries says the same as one of them, and a list of one as its entry."""
    return values[0] if all(value == values[0] for value in values) else values


def _plain(value: Any, path: Callable[[Path], str]) -> Any:
    if isinstance(value, Path):
        return path(value)
    if isinstance(value, tuple | list):
        return [_plain(item, path) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item, path) for key, item in value.items()}
    return value
