"""Names and lazy targets; plugins that clash, break, are blocked or traced."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, EntryPoint
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from prunekit import hookimpl, plugins
from prunekit.errors import DuplicateName, PluginError, PrunekitError, UnknownName
from prunekit.registry import Registry


class Target:
    """Something to register."""


@pytest.fixture
def fresh() -> Iterator[None]:
    """A plugin manager that is built in the test and forgotten after it."""
    plugins.reset()
    yield
    plugins.reset()


def module(name: str, **hooks: Any) -> ModuleType:
    made = ModuleType(name)
    for hook, function in hooks.items():
        setattr(made, hook, hookimpl(function))
    return made


def registers(*names: str, target: str = f"{__name__}:Target") -> Any:
    def prunekit_register(registry: Registry) -> None:
        for name in names:
            registry.strategy(name, target, summary=f"about {name}")

    return prunekit_register


def test_entries_carry_their_origin_and_load_on_get() -> None:
    registry = Registry("mine", "mine 1.0")
    registry.strategy("fast", f"{__name__}:Target", summary="quick")
    registry.model("tiny", f"{__name__}:Target")
    (entry,) = registry.strategies()
    assert (entry.name, entry.summary, entry.origin, entry.plugin) == ("fast", "quick", "mine 1.0", "mine")
    assert registry.get_strategy("fast") is Target
    assert registry.get_model("tiny") is Target
    assert [one.name for one in registry.models()] == ["tiny"]


def test_registering_imports_nothing() -> None:
    registry = Registry()
    registry.strategy("lazy", "prunekit_no_such_module:Thing")
    with pytest.raises(PluginError, match=r"'lazy' \(prunekit_no_such_module:Thing\) from local code.*No module named"):
        registry.get_strategy("lazy")


def test_a_missing_attribute_and_a_target_of_the_wrong_kind() -> None:
    registry = Registry("mine", "mine 1.0")
    registry.strategy("gone", f"{__name__}:Gone")
    registry.strategy("function", f"{__name__}:registers")
    registry.model("number", "sys:maxsize")
    with pytest.raises(PluginError, match=r"from mine 1\.0.*AttributeError"):
        registry.get_strategy("gone")
    with pytest.raises(PluginError, match="is no class"):
        registry.get_strategy("function")
    with pytest.raises(PluginError, match="is no function"):
        registry.get_model("number")


def test_two_of_one_name_clash_and_name_both() -> None:
    registry = Registry("first", "one 1.0")
    registry.strategy("same", "a:B")
    with pytest.raises(
        DuplicateName, match=r"strategy 'same'.*plugin 'first' of one 1\.0.*plugin 'second' of two 2\.0"
    ):
        registry.signed("second", "two 2.0").strategy("same", "c:D")
    registry.model("same", "a:B")  # models have names of their own


def test_an_unknown_name_gets_a_suggestion_and_the_list() -> None:
    registry = Registry()
    for name in ("fastv", "vtw"):
        registry.strategy(name, "a:B")
    with pytest.raises(UnknownName) as caught:
        registry.get_strategy("FastVV")
    assert str(caught.value) == (
        "unknown strategy 'FastVV' (did you mean 'fastv'? known: fastv, vtw; see `prunekit list`)"
    )
    with pytest.raises(UnknownName, match=r"unknown model 'x' \(known: none; see"):
        registry.get_model("x")


@pytest.mark.parametrize(
    ("name", "target"), [("Big", "a:B"), ("", "a:B"), ("a b", "a:B"), ("ok", "a.b"), ("ok", "a:b.c")]
)
def test_names_and_targets_are_checked(name: str, target: str) -> None:
    with pytest.raises(PluginError, match="must be"):
        Registry().strategy(name, target)


def test_the_built_in_strategies_come_through_the_entry_point(fresh: None) -> None:
    registry = plugins.registry()
    assert {"dense", "fastv"} <= {entry.name for entry in registry.strategies()}
    assert {entry.plugin for entry in registry.strategies()} == {"strategies"}
    assert registry.strategy_entry("fastv").origin.startswith("prunekit 0.")
    assert all(isinstance(registry.get_strategy(entry.name), type) for entry in registry.strategies())


def test_registration_is_not_historic(fresh: None) -> None:
    plugins.register(module("late", prunekit_register=registers("late-one")), "late")
    entry = plugins.registry().strategy_entry("late-one")
    assert (entry.plugin, entry.origin, entry.summary) == ("late", "module late", "about late-one")
    plugins.unregister("late")
    assert "late-one" not in [entry.name for entry in plugins.registry().strategies()]


def test_two_plugins_with_one_strategy_name(fresh: None) -> None:
    plugins.register(module("late", prunekit_register=registers("fastv")), "late")
    with pytest.raises(
        DuplicateName, match=r"plugin 'strategies' of prunekit 0.*plugin 'late'|plugin 'late'.*'strategies'"
    ):
        plugins.registry()


def test_pipelines_are_collected_by_absolute_path(fresh: None, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    plugins.register(module("more", prunekit_pipelines=lambda: {"mine": file}), "more")
    registry = plugins.registry()
    assert registry.get_pipeline("mine") == str(file)
    assert ("mine", "more") in [(entry.name, entry.plugin) for entry in registry.pipelines()]
    with pytest.raises(UnknownName, match=r"unknown pipeline 'min' \(did you mean 'mine'\?"):
        registry.get_pipeline("min")
    for wrong in ("mine.yaml", 3):
        with pytest.raises(PluginError, match="must be the absolute path of a YAML file"):
            registry.pipeline("other", wrong)  # type: ignore[arg-type]
    plugins.register(module("again", prunekit_pipelines=lambda: {"mine": str(file)}), "again")
    with pytest.raises(DuplicateName, match="pipeline 'mine' is registered twice"):
        plugins.registry()


def test_models_are_collected(fresh: None) -> None:
    plugins.register(module("more", prunekit_models=lambda: {"small": f"{__name__}:Target"}), "more")
    assert plugins.registry().get_model("small") is Target
    plugins.register(module("odd", prunekit_models=lambda: ["small"]), "odd")
    with pytest.raises(PluginError, match=r"plugin 'odd'.*prunekit_models gave .*not a dict"):
        plugins.registry()


def test_a_plugin_that_raises_is_named(fresh: None) -> None:
    def prunekit_register(registry: Registry) -> None:
        raise KeyError("oh")

    plugins.register(module("bad", prunekit_register=prunekit_register), "bad")
    with pytest.raises(
        PluginError, match=r"plugin 'bad' of module bad: prunekit_register raised KeyError.*DISABLE_PLUGINS=bad"
    ):
        plugins.registry()


@pytest.mark.parametrize(
    ("hook", "function", "said"),
    [
        ("prunekit_regsiter", lambda registry: None, "unknown hook 'prunekit_regsiter'"),
        ("prunekit_register", lambda registy: None, r"hook 'prunekit_register'.*registy"),
    ],
    ids=["hook", "argument"],
)
def test_a_misspelt_hook_is_refused_and_leaves_nothing(fresh: None, hook: str, function: Any, said: str) -> None:
    before = plugins.described()
    with pytest.raises(PluginError, match=rf"(?s)plugin 'typo' of 'typo' is refused.*{said}"):
        plugins.register(module("typo", **{hook: function}), "typo")
    assert plugins.described() == before


def test_registering_twice_keeps_the_first(fresh: None) -> None:
    late = module("late", prunekit_register=registers("late-one"))
    plugins.register(late, "late")
    with pytest.raises(PluginError, match="is refused"):
        plugins.register(late, "late")
    assert "late-one" in [entry.name for entry in plugins.registry().strategies()]


def points(monkeypatch: pytest.MonkeyPatch, *made: tuple[str, str, str]) -> None:
    """Let installed entry points be these: (distribution, name, value)."""
    found = []
    for distribution, name, value in made:
        point = EntryPoint(name, value, "prunekit")
        dist: Any = SimpleNamespace(name=distribution, version="1.0", metadata={"Name": distribution})
        assert isinstance(dist, SimpleNamespace) and not isinstance(dist, Distribution)
        found.append(point._for(dist))  # type: ignore[attr-defined]
    monkeypatch.setattr(plugins, "entry_points", lambda group: found)


def test_a_plugin_that_does_not_import_names_its_distribution(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    points(monkeypatch, ("broken-dist", "broken", "prunekit_no_such_module"))
    with pytest.raises(PluginError, match=r"plugin 'broken' of broken-dist 1\.0 .*ModuleNotFoundError.*PLUGINS=broken"):
        plugins.manager()
    monkeypatch.setenv("PRUNEKIT_DISABLE_PLUGINS", "other, broken")
    assert plugins.described() == ()


def test_two_distributions_with_one_plugin_name(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    points(monkeypatch, ("one", "same", "string"), ("two", "same", "this_is_not_reached"))
    with pytest.raises(PluginError, match=r"two distributions call their plugin 'same': one 1\.0 and two 1\.0"):
        plugins.manager()


def test_a_blocked_plugin_is_gone(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNEKIT_DISABLE_PLUGINS", "strategies")
    assert plugins.registry().strategies() == ()
    assert plugins.register(module("strategies"), "strategies") is None


def test_tracing_tells_every_call(
    fresh: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PRUNEKIT_TRACE_PLUGINS", "1")
    plugins.registry()
    assert "hook prunekit_register(registry) -> strategies\n" in capsys.readouterr().err


def test_described_says_who_implements_what(fresh: None) -> None:
    assert ("strategies", f"prunekit {_version()}", ("prunekit_pipelines", "prunekit_register")) in plugins.described()


def _version() -> str:
    from prunekit import __version__

    return __version__


def test_errors_are_one_tree_and_also_the_usual_kinds() -> None:
    assert issubclass(UnknownName, PrunekitError) and issubclass(UnknownName, LookupError)
    assert issubclass(DuplicateName, PrunekitError) and issubclass(DuplicateName, ValueError)
    assert str(UnknownName("model", "x", [])).startswith("unknown model 'x'")  # not quoted as KeyError would


def test_collecting_strategies_imports_no_torch() -> None:
    look = "assert plugins.registry().strategies(); sys.exit('torch' in sys.modules)"
    code = f"import sys; from prunekit import plugins; {look}"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, timeout=60).returncode == 0
