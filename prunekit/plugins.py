"""The plugin manager: modules of the entry-point group `prunekit`, loose files, blocking, tracing, and the registry.

A plugin is whole or it is out: one that does not import, that calls `sys.exit`, or whose hooks do not fit or fail while
it registers, is left out with a warning, and `described` says why. It stops nothing else.

Environment:
    PRUNEKIT_PLUGINS: loose plugins, files or folders, separated as in PATH.
    PRUNEKIT_DISABLE_PLUGINS: plugin names, separated by commas, that are not loaded.
    PRUNEKIT_TRACE_PLUGINS: when not empty, every hook call is written to stderr.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any

import pluggy

from prunekit import loose
from prunekit.errors import PluginError, PrunekitError, PrunekitWarning
from prunekit.hookspecs import HostHooks, ObserverHooks
from prunekit.registry import Registry

GROUP = "prunekit"
LOOSE = "PRUNEKIT_PLUGINS"
DISABLED = "PRUNEKIT_DISABLE_PLUGINS"
FAILURES = (Exception, SystemExit)  # of a plugin's code; an interrupt is the user's


@dataclass(frozen=True)
class Plugin:
    """One plugin of this process.

    origin: the distribution or loose file and its version, or a module. version: of a loose file a digest of its
    contents; empty: none is known. file: where its code lies; empty: that is unknown. hooks: names of those that it
    implements. broken: why it was left out; empty: it works.
    """

    name: str
    origin: str
    version: str = ""
    file: str = ""
    hooks: tuple[str, ...] = ()
    broken: str = ""


class Host(pluggy.PluginManager):
    """The manager of host and observer hooks.

    sources: of plugins from entry points and loose files, by name, where they come from. broken: those left out.
    skipped: names of the blocked ones that are there.
    """

    def __init__(self) -> None:
        super().__init__("prunekit")
        self.sources: dict[str, Plugin] = {}
        self.broken: list[Plugin] = []
        self.skipped: set[str] = set()
        self.add_hookspecs(HostHooks)
        self.add_hookspecs(ObserverHooks)

    def leave_out(self, source: Plugin, reason: str) -> None:
        """Note that a plugin is not used, and warn."""
        self.broken.append(replace(source, hooks=(), broken=reason))
        told = f"plugin '{source.name}' of {source.origin} is left out: {reason} ({_blocking(source.name)})"
        warnings.warn(told, PrunekitWarning, stacklevel=2)

    def throw_out(self, plugin: object, reason: str) -> None:
        """Leave out a plugin that was in use until now."""
        source = _source(self, plugin)
        self.unregister(plugin)
        self.sources.pop(source.name, None)
        self.leave_out(source, reason)


@cache
def manager() -> Host:
    """The plugin manager of this process, with every installed plugin and every loose file that is not blocked."""
    built = Host()
    trace(built)
    for name in filter(None, (part.strip() for part in os.environ.get(DISABLED, "").split(","))):
        built.set_blocked(name)
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        _load(built, _installed(point), point.load)
    for text in filter(None, os.environ.get(LOOSE, "").split(os.pathsep)):
        _load_loose(built, Path(text).expanduser().absolute())
    return built


def reset() -> None:
    """Forget the plugin manager of this process; the next use loads every plugin anew."""
    manager.cache_clear()


def register(plugin: object, name: str | None = None) -> str | None:
    """Add a module or an object with hook implementations to this process; returns its name, None if it is blocked.

    One that is there already stays as it is, under the name that it has. Raises PluginError when its hooks do not fit
    the specifications, or another plugin has the name.
    """
    if (known := manager().get_name(plugin)) is not None:
        return known
    registered = _register(manager(), plugin, name, f"{getattr(plugin, '__name__', plugin)!r}")
    _forget_broken(str(registered))
    return registered


def unregister(name: str) -> None:
    """Take out a plugin that `register` added."""
    if not _forget_broken(name):
        manager().unregister(name=name)


def registry() -> Registry:
    """What the plugins of this process register, collected anew on each call. Raises DuplicateName."""
    filled = Registry()
    for one in _collected():
        filled.include(one)
    return filled


def call(name: str, hook: str, **arguments: Any) -> list[Any] | None:
    """What the plugin `name` answers to a host hook; None: it raised, and is left out from now on."""
    plugin = manager().get_plugin(name)
    try:
        return list(only(name, hook)(**arguments))
    except FAILURES as error:
        manager().throw_out(plugin, str(error) if isinstance(error, PrunekitError) else f"{hook} raised {_told(error)}")
        return None


def only(name: str, hook: str) -> pluggy.HookCaller:
    """A caller of a host or observer hook that reaches the plugin `name` alone: no other's wrapper stands around it."""
    plugin = manager().get_plugin(name)
    return manager().subset_hook_caller(hook, [other for other, _ in _named(manager()) if other is not plugin])


def names() -> list[str]:
    """The names of all plugins that are in use, in the order in which they were registered."""
    return [name for _, name in _named(manager())]


def origin(plugin: object) -> str:
    """Where a plugin comes from: distribution and version, loose file and digest, else the name of its module."""
    return _source(manager(), plugin).origin


def described() -> tuple[Plugin, ...]:
    """Every plugin of this process by name, also those that are left out: with why."""
    _collected()  # shows which of them cannot register
    working = [
        replace(_source(manager(), plugin), hooks=tuple(sorted(one.name for one in callers)))
        for plugin, _ in _named(manager())
        if (callers := manager().get_hookcallers(plugin)) is not None
    ]
    return tuple(sorted([*working, *manager().broken], key=lambda one: (one.name, one.origin)))


def trace(target: pluggy.PluginManager) -> None:
    """Write every hook call of `target` to stderr, if PRUNEKIT_TRACE_PLUGINS asks for it."""
    if not os.environ.get("PRUNEKIT_TRACE_PLUGINS"):
        return

    def before(hook: str, methods: Any, arguments: Mapping[str, Any]) -> None:
        called = ", ".join(method.plugin_name for method in methods) or "nobody"
        sys.stderr.write(f"hook {hook}({', '.join(arguments)}) -> {called}\n")

    target.add_hookcall_monitoring(before, lambda outcome, hook, methods, arguments: None)


def _collected() -> list[Registry]:
    """What each plugin registers."""
    filled = [_filled(name) for name in names()]
    return [one for one in filled if one is not None]


def _filled(name: str) -> Registry | None:
    plugin = manager().get_plugin(name)
    own = Registry(name, origin(plugin))
    if call(name, "prunekit_register", registry=own) is None:
        return None
    tables: dict[str, Callable[[str, Any], None]] = {
        "prunekit_models": own.model, "prunekit_data": own.source, "prunekit_pipelines": own.pipeline,
    }  # fmt: skip
    for hook, add in tables.items():
        if (answers := call(name, hook)) is None:
            return None
        try:
            for named in answers:
                if not isinstance(named, Mapping):
                    raise PluginError(f"{hook} gave {named!r}, not a dict")
                for key, target in named.items():
                    add(key, target)
        except PrunekitError as error:
            manager().throw_out(plugin, str(error))
            return None
    return own


def _installed(point: EntryPoint) -> Plugin:
    """What is known of an entry point before it is imported."""
    spec = None
    with contextlib.suppress(ImportError, ValueError):
        spec = importlib.util.find_spec(point.module.partition(".")[0])
    file = (spec.origin if spec is not None and spec.has_location else None) or ""
    if point.dist is None:
        return Plugin(point.name, "an unknown distribution", file=file)
    return Plugin(point.name, f"{point.dist.name} {point.dist.version}", point.dist.version, file)


def _load_loose(built: Host, path: Path) -> None:
    name, held = loose.name_of(path), {os.path.realpath(_file(plugin)) for plugin, _ in _named(built) if _file(plugin)}
    file = path / "__init__.py" if path.is_dir() else path
    if os.path.realpath(file) in held:
        return  # named twice, or installed as well
    digest = loose.digest(path) if file.is_file() else ""
    source = Plugin(name, f"{path.name} {digest}".strip(), digest, str(file))
    plugin = _load(built, source, lambda: loose.load(path))
    if plugin is not None and not built.get_hookcallers(plugin):
        built.throw_out(plugin, "it implements no hook: `prunekit_register`, under @hookimpl, makes strategies known")


def _load(built: Host, source: Plugin, load: Callable[[], object]) -> object | None:
    """Import and register one plugin and return it; what goes wrong there goes into `broken`."""
    if built.is_blocked(source.name):
        built.skipped.add(source.name)
        return None
    if (other := built.sources.get(source.name)) is not None:
        built.leave_out(source, f"{other.origin} has a plugin of that name, which is used")
        return None
    try:
        plugin = load()
        if built.is_registered(plugin):
            return None  # under another name, and once is enough
        _register(built, plugin, source.name, source.origin)
    except PluginError as error:
        built.leave_out(source, " ".join(str(error.__cause__ or error).split()))
        return None
    except FAILURES as error:
        built.leave_out(source, f"it does not import: {_told(error)}")
        return None
    built.sources[source.name] = source
    return plugin


def _register(built: Host, plugin: object, name: str | None, source: str) -> str | None:
    try:
        registered = built.register(plugin, name)
        built.check_pending()
    except (ValueError, pluggy.PluginValidationError) as error:
        shown = name or str(getattr(plugin, "__name__", plugin))
        if built.is_registered(plugin):
            built.unregister(plugin)
        reason = " ".join(str(error).split())
        raise PluginError(f"plugin '{shown}' of {source} is refused: {reason} ({_blocking(shown)})") from error
    return registered


def _forget_broken(name: str) -> bool:
    """Strike a plugin from those that are left out; whether it was one."""
    kept = [one for one in manager().broken if one.name != name]
    found, manager().broken = len(kept) < len(manager().broken), kept
    return found


def _source(built: Host, plugin: object) -> Plugin:
    name = built.get_name(plugin) or ""
    if (known := built.sources.get(name)) is not None:
        return replace(known, file=_file(plugin) or known.file)
    module = getattr(plugin, "__name__", None) or type(plugin).__module__
    package = module.partition(".")[0]
    try:
        return Plugin(name, f"{package} {version(package)}", version(package), _file(plugin))
    except PackageNotFoundError:
        return Plugin(name, f"module {module}", file=_file(plugin))


def _file(plugin: object) -> str:
    """The file of a module, or of the module of an object's class."""
    module = plugin if hasattr(plugin, "__file__") else sys.modules.get(type(plugin).__module__)
    return getattr(module, "__file__", None) or ""


def _told(error: BaseException) -> str:
    """An exception of a plugin's code in one line, with the place that raised it."""
    what = "SystemExit: it calls sys.exit" if isinstance(error, SystemExit) else type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames and not isinstance(error, SyntaxError) else ""
    return f"{what}: {' '.join(str(error).split())}{place}"


def _named(built: Host) -> list[tuple[object, str]]:
    return [(plugin, name) for name, plugin in built.list_name_plugin() if plugin is not None]


def _blocking(name: str) -> str:
    return f"repair or uninstall it, or block it: `prunekit -p no:{name} ...`, PRUNEKIT_DISABLE_PLUGINS={name}"
