"""What plugins rest on changes on purpose and in sight: a record of every hook, a version, and warnings by pluggy."""

from __future__ import annotations

import copy
import warnings

import hook_snapshot
import pluggy
import pytest

from prunekit import hookimpl, hookspecs
from prunekit.errors import DeprecatedHook, PrunekitWarning
from prunekit.strategy import inputs


def test_the_record_is_that_of_today() -> None:
    """If this fails, read what has changed, count up SPEC_VERSION, and run `python tests/hook_snapshot.py`."""
    found = hook_snapshot.changes(hook_snapshot.recorded(), hook_snapshot.now())
    assert found == [], "\n".join(found)


def test_the_record_holds_every_hook() -> None:
    hooks = {name for group in vars(hookspecs).values() if isinstance(group, type) and group.__module__ ==
             hookspecs.__name__ for name, one in vars(group).items() if not name.startswith("_")}  # fmt: skip
    assert {name.partition(".")[2] for name in hook_snapshot.recorded()["hooks"]} == hooks


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("hooks", "TokenHooks.score_tokens", "arguments"), ["self"], "hooks > TokenHooks.score_tokens > arguments: "),
        (("hooks", "HostHooks.prunekit_models"), None, "hooks > HostHooks.prunekit_models"),
        (("strategy", "per_sample"), "True", "strategy > per_sample: was False, is True"),
        (("classes", "Rows", "heads"), "'sum'", "classes > Rows > heads: was 'mean', is 'sum'"),
    ],
)
def test_any_change_shows(path: tuple[str, ...], value: object, said: str) -> None:
    changed = copy.deepcopy(hook_snapshot.recorded())
    inside = changed
    for name in path[:-1]:
        inside = inside[name]
    inside[path[-1]] = value
    (line,) = hook_snapshot.changes(hook_snapshot.recorded(), changed)
    assert line.startswith(said)


def test_a_change_needs_another_version(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    file = tmp_path / "hookspecs.json"
    file.write_text(hook_snapshot.FILE.read_text())
    monkeypatch.setattr(hook_snapshot, "FILE", file)
    row = inputs.Input("shine", "float", "B V", "how bright each token is")
    monkeypatch.setattr(inputs, "INPUTS", (*inputs.INPUTS, row))
    with pytest.raises(SystemExit, match="count up SPEC_VERSION"):
        hook_snapshot.main()
    assert "shine" not in file.read_text()
    major, minor = hookspecs.SPEC_VERSION
    monkeypatch.setattr(hookspecs, "SPEC_VERSION", (major, minor + 1))
    hook_snapshot.main()
    assert "shine of score_tokens, select_tokens, merge_tokens" in hook_snapshot.recorded()["inputs"]


def specs(monkeypatch: pytest.MonkeyPatch) -> type:
    """Specifications as a later version may have them: an old hook, and one with an old input."""
    old = inputs.Input("shine", "float", "B V", "how bright each token is", deprecated="gone in 2.0; name `hidden`")
    monkeypatch.setattr(inputs, "INPUTS", (*inputs.INPUTS, old))

    class Later:
        @hookspecs._with_inputs
        def score_tokens(self):
            """Decide how important each visual token is."""

        @hookspecs.hookspec(warn_on_impl=DeprecatedHook("`weigh_tokens`: gone in 2.0; implement `score_tokens`"))
        def weigh_tokens(self):
            """What it was called before."""

    return Later


def test_what_is_deprecated_warns_the_author_and_works_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """When a plugin registers, once for each hook, at the line of the author's own function."""
    manager = pluggy.PluginManager("prunekit")
    manager.add_hookspecs(specs(monkeypatch))

    class Author:
        @hookimpl
        def score_tokens(self, shine):
            return shine

        @hookimpl
        def weigh_tokens(self):
            return 7

    class UpToDate:
        @hookimpl
        def score_tokens(self, hidden):
            return None

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        manager.register(UpToDate())
        assert told == []
        manager.register(Author())
    assert sorted(str(one.message) for one in told) == [
        "`shine`: gone in 2.0; name `hidden`", "`weigh_tokens`: gone in 2.0; implement `score_tokens`",
    ]  # fmt: skip
    for one in told:
        assert one.filename == __file__ and issubclass(one.category, (PrunekitWarning, DeprecationWarning))
    assert manager.hook.weigh_tokens() == [7]
    assert manager.hook.score_tokens(shine=3, **{one.name: 0 for one in inputs.inputs_of("score_tokens")[:-1]}) == 3


def test_nothing_is_deprecated_without_a_word_what_to_do() -> None:
    for one in inputs.INPUTS:
        assert not one.deprecated or ";" in one.deprecated, one.name
