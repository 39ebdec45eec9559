"""The plugin manager: modules of the entry-point group `prunekit`, blocking, tracing, and the registry they fill.

Environment:
    PRUNEKIT_DISABLE_PLUGINS: plugin names, separated by commas, that are not loaded.
    PRUNEKIT_TRACE_PLUGINS: when not empty, every hook call is written to stderr.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from functools import cache
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, version
from typing import Any

import pluggy

from prunekit.errors import PluginError, PrunekitError
from prunekit.hookspecs import HostHooks, ObserverHooks
from prunekit.registry import Registry

GROUP = "prunekit"


class Host(pluggy.PluginManager):
    """The manager of host and observer hooks. `sources`: plugin name to the distribution and version it came from."""

    def __init__(self) -> None:
        super().__init__("prunekit")
        self.sources: dict[str, str] = {}
        self.add_hookspecs(HostHooks)
        self.add_hookspecs(ObserverHooks)


@cache
def manager() -> Host:
    """The plugin manager of this process, with every installed plugin that is not blocked. Raises PluginError."""
    built = Host()
    trace(built)
    for name in filter(None, (part.strip() for part in os.environ.get("PRUNEKIT_DISABLE_PLUGINS", "").split(","))):
        built.set_blocked(name)
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        if not built.is_blocked(point.name):
            _load(built, point)
    return built


def reset() -> None:
    """Forget the plugin manager of this process; the next use loads every plugin anew."""
    manager.cache_clear()


def register(plugin: object, name: str | None = None) -> str | None:
    """Add a module or an object with hook implementations to this process; returns its name, None if it is blocked.

    Raises PluginError when its hooks do not fit the specifications.
    """
    return _register(manager(), plugin, name, f"{getattr(plugin, '__name__', plugin)!r}")


def unregister(name: str) -> None:
    """Take out a plugin that `register` added."""
    manager().unregister(name=name)


def registry() -> Registry:
    """What the plugins of this process register, collected anew on each call. Raises PluginError, DuplicateName."""
    filled = Registry()
    for plugin, name in _named(manager()):
        signed = filled.signed(name, origin(plugin))
        # A hook caller for this plugin alone: so we know who registers what.
        others = [other for other, _ in _named(manager()) if other is not plugin]
        _guarded(signed, manager().subset_hook_caller("prunekit_register", others), registry=signed)
        tables = {
            "prunekit_models": signed.model, "prunekit_data": signed.source, "prunekit_pipelines": signed.pipeline,
        }  # fmt: skip
        for hook, add in tables.items():
            for named in _guarded(signed, manager().subset_hook_caller(hook, others)):
                if not isinstance(named, Mapping):
                    raise PluginError(f"plugin '{name}' of {signed.origin}: {hook} gave {named!r}, not a dict")
                for key, target in named.items():
                    add(key, target)
    return filled


def origin(plugin: object) -> str:
    """Where a plugin comes from: distribution and version, else the name of its module."""
    source = manager().sources.get(manager().get_name(plugin) or "")
    if source:
        return source
    module = getattr(plugin, "__name__", None) or type(plugin).__module__
    package = module.partition(".")[0]
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"module {module}"


def described() -> tuple[tuple[str, str, tuple[str, ...]], ...]:
    """Every plugin of this process: name, origin, and the hooks that it implements."""
    return tuple(
        (name, origin(plugin), tuple(sorted(caller.name for caller in manager().get_hookcallers(plugin) or ())))
        for plugin, name in sorted(_named(manager()), key=lambda pair: pair[1])
    )


def trace(target: pluggy.PluginManager) -> None:
    """Write every hook call of `target` to stderr, if PRUNEKIT_TRACE_PLUGINS asks for it."""
    if not os.environ.get("PRUNEKIT_TRACE_PLUGINS"):
        return

    def before(hook: str, methods: Any, arguments: Mapping[str, Any]) -> None:
        called = ", ".join(method.plugin_name for method in methods) or "nobody"
        sys.stderr.write(f"hook {hook}({', '.join(arguments)}) -> {called}\n")

    target.add_hookcall_monitoring(before, lambda outcome, hook, methods, arguments: None)


def _load(built: Host, point: EntryPoint) -> None:
    source = f"{point.dist.name} {point.dist.version}" if point.dist else "an unknown distribution"
    if point.name in built.sources:
        raise PluginError(
            f"two distributions call their plugin '{point.name}': {built.sources[point.name]} and {source} "
            f"({_blocking(point.name)})"
        )
    try:
        plugin = point.load()
    except Exception as error:
        raise PluginError(
            f"plugin '{point.name}' of {source} ({point.value}) does not import: {type(error).__name__}: {error} "
            f"({_blocking(point.name)})"
        ) from error
    if _register(built, plugin, point.name, source):
        built.sources[point.name] = source


def _register(built: Host, plugin: object, name: str | None, source: str) -> str | None:
    already = built.is_registered(plugin)
    try:
        registered = built.register(plugin, name)
        built.check_pending()
    except (ValueError, pluggy.PluginValidationError) as error:
        shown = name or str(getattr(plugin, "__name__", plugin))
        if not already and built.is_registered(plugin):
            built.unregister(plugin)
        reason = " ".join(str(error).split())
        raise PluginError(f"plugin '{shown}' of {source} is refused: {reason} ({_blocking(shown)})") from error
    return registered


def _guarded(signed: Registry, caller: Any, **arguments: Any) -> list[Any]:
    try:
        return list(caller(**arguments))
    except PrunekitError:
        raise
    except Exception as error:
        raise PluginError(
            f"plugin '{signed.plugin}' of {signed.origin}: {caller.name} raised {type(error).__name__}: {error} "
            f"({_blocking(signed.plugin)})"
        ) from error


def _named(built: Host) -> list[tuple[object, str]]:
    return [(plugin, name) for name, plugin in built.list_name_plugin() if plugin is not None]


def _blocking(name: str) -> str:
    return f"repair or uninstall it, or set PRUNEKIT_DISABLE_PLUGINS={name}"
