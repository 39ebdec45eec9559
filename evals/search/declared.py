"""A search as its file or its flags say it: read as pipeline files are, every fault at once and at its place."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from prunekit_evals.run import settings
from prunekit_evals.run.settings import Answers
from prunekit_evals.search.space import Choices, Domain, Range, Space, searched

from prunekit import plugins
from prunekit.errors import Fault, SpecError, UnknownName, Where, did_you_mean
from prunekit.pipeline.build import build
from prunekit.spec import places
from prunekit.spec.budget_keys import Budget, read_budget
from prunekit.spec.compose import Composed, Source, compose
from prunekit.spec.places import Node
from prunekit.spec.schema import NAME
from prunekit.strategy.decisions import ModelShape

OTHER_KEYS = ("description", "budget", "strategies")
RANGE_KEYS = ("from", "to", "step", "log")
SHAPED = "a search has `model`, `tasks`, `budget` and `strategies`: see docs/search.md"


def _least(default: int, least: int = 1) -> Any:
    return field(default=default, metadata={"least": least})


@dataclass(frozen=True)
class Settings(Answers):
    """What a search says beside its budget and its strategies, and how it asks.

    stages: most token stages of a candidate. trials: candidates that are asked. calibration, held_out: questions of
    each task, at least. factor: each rung asks so many times the questions of the one before, and of so many candidates
    one goes on. seed: of the split and of what is drawn. baselines: pipelines, brought to the same cost, that the
    winner is compared with; None takes all that are registered. data_root, include_path: as `prunekit eval` has them.
    """

    model: str
    tasks: tuple[str, ...]
    name: str = "search"
    stages: int = _least(2)
    trials: int = _least(20)
    calibration: int = _least(100)
    held_out: int = _least(200)
    factor: int = _least(3, 2)
    seed: int = _least(0, 0)
    baselines: tuple[str, ...] | None = None
    data_root: Path | None = None
    include_path: Path | None = None


@dataclass(frozen=True)
class Declared:
    """A search that is read, but not yet looked at with a model.

    strategies: name -> the node of its values, or of the name alone where it has none.
    """

    settings: Settings
    budget: Budget
    strategies: Mapping[str, Node] = field(default_factory=dict)


def read(source: Source, overrides: Sequence[str] = ()) -> Declared:
    """The search of a file, or of a dict, with overrides such as `trials=40`. Raises SpecError with every fault."""
    faults: list[Fault] = []
    keys = [one.name for one in dataclasses.fields(Settings)]
    composed = compose(source, overrides, frozenset((*keys, *OTHER_KEYS)), faults)
    values = composed.values
    if values is None:
        raise SpecError([replace(one, hint=SHAPED) if "pipeline" in one.hint else one for one in faults])
    later: list[Fault] = []
    told = _settings(values, composed, later)
    budget = read_budget(values.get("budget"), later)
    strategies = _strategies(values.get("strategies"), later)
    for use, node in strategies.items():
        for key, one in _values(node).items():
            _domain(one, f"strategies.{use}.{key}", later)
    label = None if composed.label == "<dict>" else Where(composed.label, 1, 1)
    later += [Fault(label, key, "is missing", SHAPED) for key in ("budget", "strategies") if key not in values]
    faults += composed.resolution.judge(later)
    if faults or told is None or budget is None:
        raise SpecError(_sorted(faults))
    return Declared(told, budget, strategies)


def space_of(declared: Declared, shape: ModelShape) -> Space:
    """What is searched on a model with these numbers. Raises SpecError for values that no stage of it takes."""
    faults: list[Fault] = []
    registry = plugins.registry()
    found = []
    for use, node in declared.strategies.items():
        try:
            registry.strategy_entry(use)
        except UnknownName as error:
            faults.append(Fault(node.key, f"strategies.{use}", error.message, error.hint))
            continue
        domains = {key: _domain(one, f"strategies.{use}.{key}", faults) for key, one in _values(node).items()}
        given = {key: domain for key, domain in domains.items() if domain is not None}
        one = searched(use, registry.get_strategy(use), given, shape)
        faults += _value_faults(use, one.values, given, node, shape)
        found.append(one)
    if faults:
        raise SpecError(_sorted(faults))
    return Space(tuple(found), declared.settings.stages)


def _settings(values: Mapping[str, Node], composed: Composed, faults: list[Fault]) -> Settings | None:
    before = len(faults)
    given = {key: node for key, node in values.items() if key not in OTHER_KEYS}
    start = None if composed.label == "<dict>" else Where(composed.label, 1, 1)
    checked = settings.read(Settings, given, faults, OTHER_KEYS, start)
    if "name" not in given:
        checked["name"] = composed.name if composed.name != "inline" else Settings.name
    if not NAME.fullmatch(checked.get("name", Settings.name)):
        message = "must be letters, digits, '.', '_' and '-', beginning with a letter or digit"
        faults.append(Fault(given["name"].where if "name" in given else start, "name", message, "it names files"))
    if checked.get("tasks") == ():
        faults.append(Fault(given["tasks"].where, "tasks", "is empty", "name tasks of lmms-eval, such as [pope, gqa]"))
    return None if len(faults) > before else Settings(**checked)


def _strategies(node: Node | None, faults: list[Fault]) -> dict[str, Node]:
    """Names with the nodes of their values, from a mapping or a list of names."""
    if node is None:
        return {}
    if not isinstance(node.data, dict | list) or not node.data:
        hint = "such as {divprune: {}, fastv: {at: [2, 4]}}, or a list of names"
        told = "is empty" if isinstance(node.data, dict | list) else f"must name strategies, not {node}"
        faults.append(Fault(node.where, "strategies", told, hint))
        return {}
    if isinstance(node.data, list):
        named = [one for one in node.data if isinstance(one.data, str)]
        for one in node.data:
            if one not in named:
                faults.append(Fault(one.where, "strategies", f"must be the name of a strategy, not {one}"))
        return {str(one.data): one for one in named}
    for use, one in node.data.items():
        if not isinstance(one.data, dict | None):
            hint = "such as {at: [2, 4]}; {} where nothing is to be said"
            faults.append(Fault(one.where, f"strategies.{use}", f"must be a mapping of values, not {one}", hint))
    return dict(node.data)


def _values(node: Node) -> Mapping[str, Node]:
    """Of a strategy what is said of its values; nothing of one that is only named."""
    return node.data if isinstance(node.data, dict) else {}


def _domain(node: Node, key: str, faults: list[Fault]) -> Domain | None:
    """A list names choices, `{from: 0.1, to: 0.9}` a range, and anything else is the one value."""
    if isinstance(node.data, list):
        if not node.data:
            faults.append(Fault(node.where, key, "is empty", "name at least one value"))
            return None
        return Choices(tuple(one.plain() for one in node.data))
    if not isinstance(node.data, dict):
        return Choices((node.plain(),))
    before = len(faults)
    for name, one in node.data.items():
        if name not in RANGE_KEYS:
            hint = f"{did_you_mean(name, RANGE_KEYS)}a range has {', '.join(RANGE_KEYS)}"
            faults.append(Fault(one.key, f"{key}.{name}", "unknown key", hint))
    plain = node.plain()
    low, high, step, log = plain.get("from"), plain.get("to"), plain.get("step"), plain.get("log", False)
    if len(faults) > before:
        return None
    numbers = all(isinstance(one, int | float) and not isinstance(one, bool) for one in (low, high))
    if not numbers or not low < high:
        faults.append(Fault(node.where, key, "a range goes `from` a number `to` a larger one", "{from: 0.1, to: 0.9}"))
    elif step is not None and (isinstance(step, bool) or not isinstance(step, int | float) or step <= 0):
        faults.append(Fault(node.data["step"].where, f"{key}.step", f"must be a number above 0, not {step!r}"))
    elif not isinstance(log, bool) or (log and (low <= 0 or step is not None)):
        message = "is true or false; true needs `from` above 0 and no `step`"
        faults.append(Fault(node.data["log"].where, f"{key}.log", message))
    return None if len(faults) > before else Range(low, high, step, log)


def _value_faults(
    use: str, values: Mapping[str, Domain], given: Mapping[str, Domain], node: Node, shape: ModelShape
) -> Iterator[Fault]:
    """Each declared value in a stage of its own, with the usual ones of the others; and the usual ones together."""
    usual = {key: domain.ends()[0] for key, domain in values.items()}
    wrong = set()
    for fault in _refused(use, usual, None):
        key = fault.key.removeprefix("stages[0]").removeprefix(".")
        wrong.add(key.partition("[")[0])
        if key.partition("[")[0] not in given:
            path = ".".join(filter(None, ("strategies", use, key)))
            yield Fault(node.key or node.where, path, fault.message, fault.hint)
    right = {key: value for key, value in usual.items() if key not in wrong}
    for key, domain in given.items():
        for number, value in enumerate(domain.ends()):
            for fault in _refused(use, {**right, key: value}, shape):
                if fault.key.startswith(f"stages[0].{key}"):
                    hint = fault.hint
                    if isinstance(value, int | str) and "a list" in fault.message:
                        hint = "a list names choices; for one that is a list write [[...]]"
                    unknown = fault.message == "unknown key"
                    where = node.data[key].key if unknown else _place(node.data[key], number)
                    yield Fault(where, f"strategies.{use}.{key}", fault.message, hint)


def _refused(use: str, stage: Mapping[str, Any], shape: ModelShape | None) -> Sequence[Fault]:
    """What is wrong with a stage of these values, on a model where one is given."""
    data = {key: value for key, value in stage.items() if key != "at" or value is not None}
    try:
        pipeline = build({"stages": [{"use": use, **places.escaped(data)}]})
        if shape is not None:
            pipeline.bind(shape)
    except SpecError as error:
        return error.faults
    return ()


def _place(node: Node, number: int) -> Where | None:
    """Of one of the values of a domain."""
    if isinstance(node.data, list):
        return node.data[number].where
    ends = ("from", "to")
    return node.data[ends[number]].where if isinstance(node.data, dict) else node.where


def _sorted(faults: Sequence[Fault]) -> list[Fault]:
    """By their place, each once."""
    return [next(group) for _, group in itertools.groupby(sorted(faults, key=_where), key=str)]


def _where(fault: Fault) -> tuple[str, int, int, str]:
    place = fault.where
    return (place.file, place.line, place.col, str(fault)) if place else ("", 0, 0, str(fault))
