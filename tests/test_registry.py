"""Names and lazy targets; plugins that clash, break, are blocked or traced."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, EntryPoint
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from prunekit import hookimpl, plugins
from prunekit.errors import DuplicateName, PluginError, PrunekitError, PrunekitWarning, UnknownName
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
    with pytest.warns(
        PrunekitWarning, match=r"plugin 'odd' of module odd is left out: prunekit_models gave .*not a dict"
    ):
        assert plugins.registry().get_model("small") is Target


def test_a_plugin_that_raises_is_named_and_left_out(fresh: None) -> None:
    """With all that it had registered before; the others stay."""

    def prunekit_register(registry: Registry) -> None:
        registry.strategy("half", f"{__name__}:Target")
        raise KeyError("oh")

    plugins.register(module("bad", prunekit_register=prunekit_register), "bad")
    said = (
        r"plugin 'bad' of module bad is left out: prunekit_register raised KeyError.*test_registry.*DISABLE_PLUGINS=bad"
    )
    with pytest.warns(PrunekitWarning, match=said):
        names = {entry.name for entry in plugins.registry().strategies()}
    assert "half" not in names and "fastv" in names
    (broken,) = (one for one in plugins.described() if one.broken)
    assert (broken.name, broken.hooks) == ("bad", ()) and "KeyError: 'oh'" in broken.broken
    assert {entry.name for entry in plugins.registry().strategies()} == names, "told once"


def raises(self: Any, registry: Registry) -> Iterator[None]:
    yield
    raise RuntimeError("around")


def yields_never(self: Any, registry: Registry) -> Iterator[None]:
    if registry is None:
        yield
    return None


def answers_otherwise(self: Any) -> Iterator[Any]:
    yield
    return 7


@pytest.mark.parametrize(
    ("hook", "function", "said"),
    [
        ("prunekit_register", raises, "prunekit_register raised RuntimeError: around"),
        ("prunekit_register", yields_never, "prunekit_register raised RuntimeError: .* did not yield"),
        ("prunekit_models", answers_otherwise, "prunekit_models raised TypeError: 'int' object is not iterable"),
    ],
    ids=["raises", "yields never", "answers otherwise"],
)
def test_a_wrapper_on_a_host_hook_cannot_break_registration(fresh: None, hook: str, function: Any, said: str) -> None:
    """It stands around its own plugin's hooks alone; others register as if it were not there."""
    wrapper = type("Wrapper", (), {hook: hookimpl(wrapper=True, tryfirst=True)(function)})()
    plugins.register(wrapper, "wrapper")
    plugins.register(module("late", prunekit_register=registers("late-one")), "late")
    with pytest.warns(PrunekitWarning, match=rf"plugin 'wrapper' of .* is left out: {said}"):
        names = {entry.name for entry in plugins.registry().strategies()}
    assert {"late-one", "fastv"} <= names and "wrapper" not in plugins.names()


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


def test_registering_twice_does_nothing(fresh: None) -> None:
    late = module("late", prunekit_register=registers("late-one"))
    plugins.register(late, "late")
    assert (plugins.register(late, "late"), plugins.register(late, "other"), plugins.register(late)) == ("late",) * 3
    assert plugins.names().count("late") == 1 and "other" not in plugins.names()
    with pytest.raises(PluginError, match="plugin 'late' of 'another' is refused"):
        plugins.register(module("another"), "late")
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


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import prunekit_no_such_module", r"ModuleNotFoundError: No module named 'prunekit_no_such_module' at .*:2"),
        ("import sys; sys.exit('enough')", r"SystemExit: it calls sys.exit: enough at .*:2"),
        ("def f(:", r"SyntaxError: invalid syntax \(\w+.py, line 2\)"),
        (
            "from prunekit import hookimpl\n@hookimpl\ndef prunekit_regster(registry): 1",
            "unknown hook 'prunekit_regster'",
        ),
    ],
    ids=["import", "exit", "syntax", "hook"],
)
def test_a_broken_plugin_is_listed_and_stops_nothing_else(
    fresh: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str, said: str
) -> None:
    name = f"prunekit_test_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(f"# A plugin.\n{code}\n")
    monkeypatch.syspath_prepend(tmp_path)
    points(monkeypatch, ("broken-dist", "broken", name), ("prunekit", "strategies", "prunekit_strategies.plugin"))
    with pytest.warns(
        PrunekitWarning, match=rf"plugin 'broken' of broken-dist 1\.0 is left out: .*{said}.*PLUGINS=broken"
    ):
        assert "fastv" in {entry.name for entry in plugins.registry().strategies()}
    broken, working = plugins.described()
    assert re.search(said, broken.broken) and not working.broken
    assert (broken.name, broken.origin, broken.version) == ("broken", "broken-dist 1.0", "1.0")
    assert broken.file == str(tmp_path / f"{name}.py")
    monkeypatch.setenv("PRUNEKIT_DISABLE_PLUGINS", "other, broken")
    plugins.reset()
    assert [one.name for one in plugins.described()] == ["strategies"]


def test_two_distributions_with_one_plugin_name(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    points(monkeypatch, ("one", "same", "string"), ("two", "same", "this_is_not_reached"))
    with pytest.warns(PrunekitWarning, match=r"'same' of two 1\.0 is left out: one 1\.0 has a plugin of that name"):
        plugins.manager()
    assert plugins.manager().get_plugin("same") is sys.modules["string"]
    assert [(one.origin, bool(one.broken)) for one in plugins.described()] == [("one 1.0", False), ("two 1.0", True)]


def test_one_module_under_two_names_is_one_plugin(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    points(monkeypatch, ("one", "first", "string"), ("two", "second", "string"))
    assert plugins.names() == ["first"]


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
    (one,) = (one for one in plugins.described() if one.name == "strategies")
    assert (one.origin, one.version, one.broken) == (f"prunekit {_version()}", _version(), "")
    assert one.hooks == ("prunekit_pipelines", "prunekit_register") and one.file.endswith("plugin.py")


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
