"""Names to lazy targets: strategies, models, data and pipelines, each with its origin.

Nothing is imported before `get_*`.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from os.path import isabs
from typing import Any

from prunekit.errors import DuplicateName, PluginError, UnknownName

NAME = re.compile(r"[a-z][a-z0-9_.-]*")
TARGET = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


@dataclass(frozen=True)
class Entry:
    """One registered name.

    target: `package.module:Attr`, imported when asked for; of a pipeline, the path of its file.
    origin: the distribution and version that brought it, such as `prunekit 0.1.0`.
    plugin: the name of the plugin that registered it, as PRUNEKIT_DISABLE_PLUGINS takes it.
    """

    name: str
    target: str
    summary: str
    origin: str
    plugin: str

    def load(self) -> Any:
        """Import the target. Raises PluginError, naming the origin, when that fails."""
        module, _, attribute = self.target.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except (Exception, SystemExit) as error:
            raise PluginError(
                f"'{self.name}' ({self.target}) from {self.origin}, plugin '{self.plugin}', does not import: "
                f"{type(error).__name__}: {error}"
            ) from error


@dataclass(frozen=True)
class Registry:
    """What plugins have registered. Two that take one name clash loudly; a name nobody took gets suggestions.

    `plugin` and `origin` are stamped on what is registered through this object; `signed` gives another signature.
    """

    plugin: str = "local"
    origin: str = "local code"
    _strategies: dict[str, Entry] = field(default_factory=dict)
    _models: dict[str, Entry] = field(default_factory=dict)
    _sources: dict[str, Entry] = field(default_factory=dict)
    _pipelines: dict[str, Entry] = field(default_factory=dict)

    def signed(self, plugin: str, origin: str) -> Registry:
        """The same registry, signing what is registered through it with another plugin and origin."""
        return Registry(plugin, origin, self._strategies, self._models, self._sources, self._pipelines)

    def include(self, other: Registry) -> None:
        """Take over everything of `other`, with its signatures. Raises DuplicateName."""
        tables = (
            ("strategy", self._strategies, other._strategies), ("model", self._models, other._models),
            ("data", self._sources, other._sources), ("pipeline", self._pipelines, other._pipelines),
        )  # fmt: skip
        for kind, table, taken in tables:
            for entry in taken.values():
                _put(kind, table, entry)

    def strategy(self, name: str, target: str, *, summary: str = "", origin: str | None = None) -> None:
        """Register a strategy class: `target` is `package.module:Class`. Raises DuplicateName, PluginError."""
        self._add("strategy", self._strategies, name, _importable, target, summary, origin)

    def model(self, name: str, target: str, *, summary: str = "", origin: str | None = None) -> None:
        """Register a short model name: `target` is a function without arguments that returns the model's folder."""
        self._add("model", self._models, name, _importable, target, summary, origin)

    def source(self, name: str, target: str, *, summary: str = "", origin: str | None = None) -> None:
        """Register prompts to train on: `target` is a function without arguments that returns a `Source`."""
        self._add("data", self._sources, name, _importable, target, summary, origin)

    def pipeline(self, name: str, file: str | PathLike[str], *, summary: str = "", origin: str | None = None) -> None:
        """Register a pipeline: `file` is the absolute path of its YAML file. Raises DuplicateName, PluginError."""
        self._add("pipeline", self._pipelines, name, _absolute, file, summary, origin)

    def strategies(self) -> tuple[Entry, ...]:
        """Every strategy, by name."""
        return tuple(sorted(self._strategies.values(), key=lambda entry: entry.name))

    def models(self) -> tuple[Entry, ...]:
        """Every short model name, by name."""
        return tuple(sorted(self._models.values(), key=lambda entry: entry.name))

    def sources(self) -> tuple[Entry, ...]:
        """Every name of data, by name."""
        return tuple(sorted(self._sources.values(), key=lambda entry: entry.name))

    def pipelines(self) -> tuple[Entry, ...]:
        """Every named pipeline, by name."""
        return tuple(sorted(self._pipelines.values(), key=lambda entry: entry.name))

    def strategy_entry(self, name: str) -> Entry:
        """The entry of a strategy, without importing it. Raises UnknownName."""
        return _find("strategy", self._strategies, name)

    def get_strategy(self, name: str) -> type[Any]:
        """Import a strategy class. Raises UnknownName, or PluginError when the target is not a class."""
        entry = self.strategy_entry(name)
        target = entry.load()
        if not isinstance(target, type):
            raise PluginError(f"strategy '{name}' of {entry.origin}: {entry.target} is {target!r}, which is no class")
        return target

    def get_model(self, name: str) -> Callable[[], str | PathLike[str]]:
        """The function that returns the folder of a model. Raises UnknownName."""
        return _function("model", _find("model", self._models, name))  # type: ignore[no-any-return]

    def get_source(self, name: str) -> Callable[[], Any]:
        """The function that returns the data of this name. Raises UnknownName."""
        return _function("data", _find("data", self._sources, name))  # type: ignore[no-any-return]

    def get_pipeline(self, name: str) -> str:
        """The path of the file of a pipeline. Raises UnknownName."""
        return _find("pipeline", self._pipelines, name).target

    def _add(
        self, kind: str, table: dict[str, Entry], name: str, check: Callable[[Any], str | None], target: Any,
        summary: str, origin: str | None,
    ) -> None:  # fmt: skip
        entry = Entry(name, str(target), summary, origin or self.origin, self.plugin)
        who = f"plugin '{entry.plugin}' of {entry.origin}"
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise PluginError(f"{who}: {kind} name {name!r} must be lower-case letters, digits, '_', '-' or '.'")
        if wrong := check(target):
            raise PluginError(f"{who}: target {target!r} of {kind} '{name}' {wrong}")
        _put(kind, table, entry)


def _put(kind: str, table: dict[str, Entry], entry: Entry) -> None:
    if entry.name in table:
        first, second = (f"plugin '{one.plugin}' of {one.origin}" for one in (table[entry.name], entry))
        raise DuplicateName(kind, entry.name, first, second)
    table[entry.name] = entry


def _importable(target: Any) -> str | None:
    if isinstance(target, str) and TARGET.fullmatch(target):
        return None
    return "must be written 'package.module:Attribute'"


def _absolute(target: Any) -> str | None:
    if isinstance(target, str | PathLike) and isabs(target):
        return None
    return "must be the absolute path of a YAML file"


def _function(kind: str, entry: Entry) -> Any:
    target = entry.load()
    if not callable(target):
        what = f"{entry.target} is {target!r}, which is no function"
        raise PluginError(f"{kind} '{entry.name}' of {entry.origin}: {what}")
    return target


def _find(kind: str, table: Mapping[str, Entry], name: str) -> Entry:
    if name not in table:
        raise UnknownName(kind, name, table)
    return table[name]
