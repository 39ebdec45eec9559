"""The contract is fair and has teeth: legitimate strategies of every kind keep it, and each rule is broken by one."""

from __future__ import annotations

import re
import subprocess
import sys
import unittest
from collections.abc import Iterator
from typing import Any

import pytest
from broken import BROKEN
from kinds import KINDS
from rules_table import table, written

from prunekit import hookimpl, plugins
from prunekit.errors import InputError
from prunekit.testing import ContractFailure, StrategyContract, pytest_plugin
from prunekit.testing.checks import CHECKS
from prunekit.testing.contract import contract
from prunekit.testing.subject import Traits

RULES = {one.name: one for one in CHECKS}
CLASSES = {f"kind-{name}": cls for name, (cls, _) in KINDS.items()} | {
    f"broken-{cls.__name__.lower()}": cls for cls, _ in BROKEN.values()
}


class Plugin:
    """Registers the strategies of this folder."""

    @hookimpl
    def prunekit_register(self, registry):
        for name, cls in CLASSES.items():
            registry.strategy(name, f"{cls.__module__}:{cls.__name__}", summary="for this test")


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    plugins.register(Plugin(), name="kinds")
    yield
    plugins.unregister("kinds")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_legitimate_strategy_keeps_the_whole_contract(kind: str) -> None:
    made = contract(f"kind-{kind}", **KINDS[kind][1])
    for rule in made.rules():
        made().hold(rule)


@pytest.mark.parametrize("rule", BROKEN)
def test_a_broken_strategy_fails_its_rule_and_is_told_why(rule: str) -> None:
    cls, found = BROKEN[rule]
    made = contract(f"broken-{cls.__name__.lower()}")
    assert RULES[rule] in made.rules()
    with pytest.raises(ContractFailure) as caught:
        made().hold(RULES[rule])
    said = " ".join(str(caught.value).split())
    assert said.startswith(f"strategy 'broken-{cls.__name__.lower()}' breaks its contract: {rule} found:")
    assert found in said, said
    for text in (RULES[rule].means, RULES[rule].breaks):
        assert text in said
    assert re.search(r"the rule: .+ often because of: ", said)


def test_every_rule_is_broken_by_one_and_explains_itself() -> None:
    assert set(BROKEN) == set(RULES) and len(RULES) == len(CHECKS)
    for one in CHECKS:
        assert one.means.endswith(".") and len(one.means) > 40 and len(one.breaks) > 15, one.name


def test_the_page_shows_every_rule() -> None:
    assert written() == table(), "run `python tests/contract/rules_table.py`"


def test_which_rules_a_strategy_has_follows_from_what_it_is() -> None:
    def rules(kind):
        return {one.name for one in contract(f"kind-{kind}").rules()}

    everyone = {"model", "source", "frozen", "yaml-round-trip", "prefill", "decoding", "kv-lengths", "same-result"}
    everyone |= {"rows-alone", "inputs-unchanged", "nothing-left", "nothing-left-after-an-exception"}
    assert all(everyone <= rules(kind) for kind in KINDS)
    assert rules("tower-merge") - everyone == {
        "sites", "keep", "keep-all", "text-stays", "no-image", "after-others", "before-others", "finite",
        "half-precision",
    }  # fmt: skip
    assert rules("layers") - everyone == {"plan", "after-others", "before-others"}
    assert {"skipped-layers", "keep-layers"} <= rules("layer-router") and "keep" not in rules("layer-router")
    assert {"skipped-layers", "keep-layers", "keep", "sites"} <= rules("both-router")
    assert "keep-layers" not in rules("planning-router") and "sites" in rules("token-router")
    assert "without-keep" in rules("unasked") & rules("layers-first") & rules("planning-tokens")
    assert "without-keep" not in rules("own-count") | rules("mid") | rules("tokens-first") | rules("both-router")
    assert "videos" in rules("video") and "videos" not in rules("mid")
    assert Traits.of(CLASSES["kind-pixels"]).pixels and not Traits.of(CLASSES["kind-tower-only"]).pixels


def test_a_rule_that_others_break_is_kept_by_them_otherwise() -> None:
    """The failures above are about their own rules, not about how strategies are registered here."""
    for name, rule in (("greedy", "rows-alone"), ("blurred", "prefill"), ("forgetful", "keep"), ("writes", "decoding")):
        contract(f"broken-{name}")().hold(RULES[rule])


def test_after_a_failure_the_model_is_another() -> None:
    """A broken strategy spoils no rule that comes after."""
    made = contract("broken-leaveshook")
    with pytest.raises(ContractFailure):
        made().hold(RULES["nothing-left"])
    made().hold(RULES["keep"])


def held(made: type[StrategyContract]) -> tuple[list[str], list[str]]:
    """The failures of all rules, as one line each, and what those say that are not tried."""
    failed, skipped = [], []
    for rule in made.rules():
        try:
            made().hold(rule)
        except ContractFailure as failure:
            failed.append(" ".join(str(failure).split()))
        except unittest.SkipTest as skip:
            skipped.append(str(skip))
    return failed, skipped


class Deaf(StrategyContract):
    """Its model is one that cannot be made."""

    use = "kind-mid"

    def model(self) -> Any:
        raise RuntimeError("no such model")


@pytest.mark.parametrize(
    ("made", "found"),
    [
        (lambda: contract("kind-mid", {"depth": 3}), r"SpecError: .*unknown key.* `options` of the contract says what"),
        (lambda: contract("broken-elsewhere"), r"a llava with 6 layers, is none for it: .*override `model\(\)`"),
        (lambda: Deaf, r"found: `model\(\)` of the contract failed with RuntimeError: no such model"),
    ],
    ids=["options", "model", "none"],
)
def test_what_can_be_tried_on_no_model_is_one_failure(made: Any, found: str) -> None:
    """And not one for each rule, of which all but the first would say the same in other words."""
    failed, skipped = held(made())
    assert len(failed) == 1 and re.search(found, failed[0]), failed
    assert len(skipped) == len(made().rules()) - 1 and "as the rule `model` says, '" in skipped[0]


def test_a_contract_says_what_it_is_of_in_words_that_there_are() -> None:
    class Nothing(StrategyContract):
        """Names no strategy."""

    class Misspelt(StrategyContract):
        use = "kind-mid"
        option = {"order": 1}
        _mine = 3
        plain = 4

        def test_of_my_own(self) -> None: ...

    with pytest.raises(InputError, match=r"Nothing names no strategy: say `use = ...` in it, the name that"):
        Nothing.rules()
    with pytest.raises(InputError, match=r"says 'option', which means nothing \(did you mean 'options'\? yours"):
        Misspelt.rules()
    del Misspelt.option
    assert Misspelt.rules()


def test_a_rule_may_be_left_out_by_name_alone() -> None:
    class Mine(StrategyContract):
        use = "kind-mid"
        without = {"half-precision": "it is for float32"}

    assert "half-precision" not in [one.name for one in Mine.rules()]
    Mine.without = {"half-precison": "a typo"}
    with pytest.raises(InputError, match=r"'half-precison', which is no rule \(did you mean 'half-precision'\?"):
        Mine.rules()


def test_an_unknown_name_is_refused_at_once() -> None:
    with pytest.raises(LookupError, match="fastv"):
        contract("fastw")


MINE = """
from prunekit import hookimpl, plugins, strategy

@strategy()
class Mine:
    "A baseline."
    @hookimpl
    def score_tokens(self, hidden):
        return hidden.float().norm(dim=-1)

@strategy()
class Bad:
    "A baseline gone wrong."
    @hookimpl
    def score_tokens(self, hidden):
        return hidden.float().norm(dim=-1) * (2 - len(hidden))

class Plugin:
    @hookimpl
    def prunekit_register(self, registry):
        registry.strategy("mine", "mine:Mine", summary="mine")
        registry.strategy("bad", "mine:Bad", summary="bad")

plugins.register(Plugin(), "mine")
"""
FOUR_LINES = """
import mine
from prunekit.testing import StrategyContract

class TestMine(StrategyContract):
    use = "mine"

def test_the_checkpoint(tiny_checkpoint):
    assert (tiny_checkpoint / "config.json").exists() and (tiny_checkpoint / "tokenizer.json").exists()
"""


def test_four_lines_and_the_plugin_in_a_project_of_its_own(tmp_path) -> None:
    """The class gives a test for each rule, the pytest plugin the same without a test file; a failure is its text."""
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "test_mine.py").write_text(FOUR_LINES)
    (tmp_path / "conftest.py").write_text("import mine\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = -p prunekit.testing.pytest_plugin\nstrategies = bad\n")
    command = [sys.executable, "-m", "pytest", "-v", "-W", "error", "-p", "no:cacheprovider", "-p", "no:randomly",
               "-p", "no:xdist", "-k", "source or rows-alone or checkpoint"]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    for test in ("TestMine::test_contract[source]", "TestMine::test_contract[rows-alone]", "test_the_checkpoint"):
        assert f"test_mine.py::{test} PASSED" in done.stdout, done.stdout + done.stderr
    assert "contract of bad[source] PASSED" in done.stdout and "1 failed, 4 passed" in done.stdout
    failure = done.stdout.partition("= FAILURES =")[2]
    assert "strategy 'bad' breaks its contract: rows-alone\n  found:\n    at 'encoder' row 0 keeps" in failure
    assert "def " not in failure and "Traceback" not in failure


def test_a_strategy_that_the_plugin_is_asked_for_and_nobody_registered() -> None:
    with pytest.raises(pytest.UsageError, match="unknown strategy 'nobody'"):
        list(pytest_plugin._rules(None, "nobody"))  # type: ignore[arg-type]
