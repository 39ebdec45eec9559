"""The pipeline file: its schema, and a reader that reports every fault at once. Knows no strategy, imports no torch."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from prunekit.errors import Fault, SpecError, Where, did_you_mean
from prunekit.spec.budget_keys import Budget, read_keeps, read_layers
from prunekit.spec.compose import Source, compose
from prunekit.spec.interpolation import Resolution
from prunekit.spec.places import Node
from prunekit.spec.risk_keys import RiskBudget, read_any_budget
from prunekit.strategy import meant
from prunekit.strategy.options import STAGE_KEYS
from prunekit.strategy.sites import ENCODER, Keep, Site

__all__ = ["STAGE_KEYS", "TOP_KEYS", "PipelineSpec", "StageSpec", "load", "read"]

TOP_KEYS = ("name", "description", "extends", "vars", "positions", "budget", "stages")
POSITIONS = ("keep", "renumber")
NAMED_SITES = ("encoder", "prefill_end", "pixels")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class StageSpec:
    """One stage as the file says it; whether the strategy exists and takes these options is not known yet.

    sites, keeps: of `at` and of `keep` or `keep_tokens`, one or one for each site; keep_layers; route_at. None when the
    file does not say.
    options: the strategy's own fields, plain data.
    where: of the stage; keys: of each value, by key path such as `layers[2]`; names: of each key itself. Places are
    None when the stage came from a dict.
    folders: where a relative path starts from, by key path.
    """

    use: str
    sites: tuple[Site, ...] | None = None
    keeps: tuple[Keep, ...] | None = None
    keep_layers: Keep | None = None
    route_at: Site | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    where: Where | None = None
    keys: Mapping[str, Where | None] = field(default_factory=dict)
    names: Mapping[str, Where | None] = field(default_factory=dict)
    folders: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class PipelineSpec:
    """A pipeline as its file says it. `source` is the path, `<inline>` or `<dict>`.

    positions: of the tokens that stay: `keep` the original ones, or `renumber` them without gaps.
    budget: what stages that name no `keep` may keep together, or what their ladder may harm.
    resolution: what became of values that are not simply written in the file; it judges later faults.
    """

    name: str
    stages: tuple[StageSpec, ...]
    source: str
    description: str = ""
    positions: Literal["keep", "renumber"] = "keep"
    budget: Budget | RiskBudget | None = None
    resolution: Resolution = field(default_factory=Resolution)


def load(source: Source, overrides: Sequence[str] = ()) -> PipelineSpec:
    """Read a pipeline: a path, YAML or JSON text (begins with `{` or holds a newline), a dict or a list of stages.

    Dicts and lists may be OmegaConf's own, `DictConfig` and `ListConfig`, or hold some; a structured config is a dict.
    overrides: `key=value` texts such as `stages[0].keep=0.3`, applied after `extends` and before `${...}` is resolved;
        `stages[0].keep=null` takes a key out.
    Raises SpecError with every fault of the text; strategies and their options are checked by `pipeline.build`.
    """
    spec, faults = read(source, overrides)
    if faults:
        raise SpecError(faults)
    return spec


def read(source: Source, overrides: Sequence[str] = ()) -> tuple[PipelineSpec, tuple[Fault, ...]]:
    """As `load`, but with the faults beside what could be read, so that more can be checked before all are raised.

    A stage whose `use` cannot be read has `use == ""`.
    """
    faults: list[Fault] = []
    composed = compose(source, overrides, frozenset((*TOP_KEYS, *STAGE_KEYS)), faults)
    label, values = composed.label, composed.values
    if values is None:
        return PipelineSpec(composed.name, (), label), tuple(faults)
    later: list[Fault] = []
    later.extend(_unknown_key(node, key, "", TOP_KEYS) for key, node in values.items() if key not in TOP_KEYS)
    name = _name(values.get("name"), composed.name, later)
    description = _text(values.get("description"), "description", later) or ""
    positions = _positions(values.get("positions"), later)
    budget = read_any_budget(values.get("budget"), later)
    if "stages" in values:
        stages = _stages(values["stages"], later)
    else:
        stages = ()
        if not faults:  # what could not be read may have held them
            start = None if label == "<dict>" else Where(label, 1, 1)
            later.append(Fault(start, "stages", "is missing", "a pipeline needs a list of stages"))
    faults += composed.resolution.judge(later)
    spec = PipelineSpec(name, stages, label, description, positions, budget, composed.resolution)
    return spec, tuple(faults)


def _stages(node: Node, faults: list[Fault]) -> tuple[StageSpec, ...]:
    if not isinstance(node.data, list):
        faults.append(Fault(node.where, "stages", f"must be a list, not {node}", "write `- use: NAME`"))
        return ()
    if not node.data:
        faults.append(Fault(node.where, "stages", "is empty", "name at least one: `- use: NAME`"))
    return tuple(_stage(one, f"stages[{index}]", faults) for index, one in enumerate(node.data))


def _stage(node: Node, path: str, faults: list[Fault]) -> StageSpec:
    if not isinstance(node.data, dict):
        faults.append(Fault(node.where, path, f"must be a mapping, not {node}", "write `- use: NAME`"))
        return StageSpec("", where=node.where)
    values = node.data
    nodes = {key: one for name, value in values.items() for key, one in value.table(name).items()}
    keys, folders = {key: one.where for key, one in nodes.items()}, {key: one.folder for key, one in nodes.items()}
    options = {key: value.plain() for key, value in values.items() if key not in STAGE_KEYS}
    use = ""
    if "use" not in values:
        hint = did_you_mean("use", values).strip() if len(values) else ""
        faults.append(Fault(node.where, f"{path}.use", "is missing", hint or "name a strategy: see `prunekit list`"))
    else:
        use = _text(values["use"], f"{path}.use", faults) or ""
    sites = _sites(values.get("at"), f"{path}.at", faults)
    many = len(sites) if sites else None if "at" in values else 1
    keeps = read_keeps(values, path, many, faults)
    layers = read_layers(values.get("keep_layers"), f"{path}.keep_layers", faults)
    route_at = _route_at(values.get("route_at"), f"{path}.route_at", faults)
    names = {name: value.key for name, value in values.items()}
    return StageSpec(use, sites, keeps, layers, route_at, options, node.where, keys, names, folders)


def _sites(node: Node | None, key: str, faults: list[Fault]) -> tuple[Site, ...] | None:
    """The sites of `at`, one or a list in the order in which the data passes them; None when there are none to read."""
    if node is None:
        return None
    if not isinstance(node.data, list):
        site = _site(node, key, faults)
        return None if site is None else (site,)
    if not node.data:
        faults.append(Fault(node.where, key, "is empty", "name at least one site, such as 2"))
        return None
    sites = [_site(one, f"{key}[{index}]", faults) for index, one in enumerate(node.data)]
    good = tuple(site for site in sites if site is not None)
    if len(good) < len(sites):
        return None
    for index, (before, site) in enumerate(itertools.pairwise(good), start=1):
        if site <= before:
            message = f"'{site}' stands after '{before}'" if site < before else f"'{site}' stands here twice"
            place = node.data[index].where
            faults.append(Fault(place, f"{key}[{index}]", message, "list sites in the order of the data, each once"))
            return None
    return good


def _route_at(node: Node | None, key: str, faults: list[Fault]) -> Site | None:
    """Where a router is asked: the decoder input, or before a decoder layer."""
    if node is None:
        return None
    if isinstance(node.data, list):
        faults.append(Fault(node.where, key, "must be one site: a router decides once", "such as encoder or 8"))
        return None
    site = _site(node, key, faults)
    if site is None or site == ENCODER or (site.in_decoder and site.point == "before"):
        return site
    behind = site.in_decoder and site.point == "after"
    hint = f"write {site.depth}" if behind else "write encoder, or the number of a layer, such as 8"
    message = f"a router is asked at the decoder input or before a layer, not at '{site}'"
    faults.append(Fault(node.where, key, message, hint))
    return None


def _site(node: Node, key: str, faults: list[Fault]) -> Site | None:
    if isinstance(node.data, list | dict) or node.data is None:
        faults.append(Fault(node.where, key, f"must be a site, not {node}", "such as encoder, 2 or 2.after"))
        return None
    data = node.data
    if isinstance(data, float):
        faults.append(Fault(node.where, key, f"{node} is not a site", "layers are whole numbers, such as 2"))
        return None
    try:
        return Site.parse(data)
    except ValueError as error:
        near = meant.site(data) or did_you_mean(str(data), NAMED_SITES).strip()
        faults.append(Fault(node.where, key, str(error), near))
        return None


def _positions(node: Node | None, faults: list[Fault]) -> Literal["keep", "renumber"]:
    if node is None or node.data == "keep":
        return "keep"
    if node.data == "renumber":
        return "renumber"
    near = did_you_mean(str(node.data), POSITIONS).strip()
    hint = near or "'renumber' closes the gaps that dropped tokens leave"
    faults.append(Fault(node.where, "positions", f"must be 'keep' or 'renumber', not {node}", hint))
    return "keep"


def _name(node: Node | None, default: str, faults: list[Fault]) -> str:
    text = _text(node, "name", faults)
    if text is None:
        return default
    if not NAME.fullmatch(text):
        message = f"{text!r} must be letters, digits, '.', '_' and '-', at most 100, beginning with a letter or digit"
        faults.append(Fault(node.where if node else None, "name", message, "it names result files"))
        return default
    return text


def _text(node: Node | None, key: str, faults: list[Fault]) -> str | None:
    """Text of a node; None, with a fault, when it holds something else, and None without one when there is no node."""
    if node is None:
        return None
    if isinstance(node.data, str) and node.data:
        return node.data
    hint = "put it in quotes" if isinstance(node.data, int | float | bool) else ""
    faults.append(Fault(node.where, key, f"must be text, not {node}", hint))
    return None


def _unknown_key(node: Node, key: str, path: str, keys: Sequence[str]) -> Fault:
    hint = f"{did_you_mean(key, keys)}known keys: {', '.join(keys)}"
    return Fault(node.key, f"{path}.{key}" if path else key, "unknown key", hint)
