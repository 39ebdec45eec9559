"""The table of versions is what the matrix saw, on the declared range, and nothing failed there."""

from __future__ import annotations

import importlib.util
import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import fresh_install
import pytest

from prunekit import upstream

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def versions() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("prunekit_versions", ROOT / "tests" / "versions.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_page_shows_the_results(versions: ModuleType) -> None:
    text = versions.PAGE.read_text(encoding="utf-8")
    assert versions.table(versions.stored()) in text


def test_the_declared_range_is_the_range_that_ran(versions: ModuleType) -> None:
    results = versions.stored()
    assert [one.transformers for one in results] == list(versions.VERSIONS)
    assert not any(one.failed for one in results) and all(one.passed for one in results)
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    declared = re.search(r'"transformers(>=(\d+\.\d+),<(\d+)\.(\d+))"', project)
    assert declared is not None and versions.VERSIONS[0] == f"{declared[2]}.0"
    assert versions.VERSIONS[-1].startswith(f"{declared[3]}.{int(declared[4]) - 1}.")
    assert declared[1] == upstream.TESTED
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert f"transformers=={versions.VERSIONS[-1]}" in pinned


def test_the_page_shows_the_fresh_install() -> None:
    one = fresh_install.stored()
    assert fresh_install.text(one) in fresh_install.PAGE.read_text(encoding="utf-8")
    assert 0 < one.kept < one.visual


def test_the_fresh_install_had_what_a_user_gets_today(versions: ModuleType) -> None:
    """All that the project asks for, and of transformers the newest minor that the tests ran on."""
    one = fresh_install.stored()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = {re.split(r"[<>=]", requirement)[0] for requirement in project["dependencies"]}
    assert set(one.installed) == asked and project["version"] in one.wheel
    assert one.installed["transformers"].rpartition(".")[0] == versions.VERSIONS[-1].rpartition(".")[0]


def test_pytorch_alone_is_lent() -> None:
    names = fresh_install.lent()
    assert "torch" in names
    known = ("torch", "functorch", *fresh_install.WITH_TORCH)
    assert [name for name in names if not name.lower().startswith(known)] == []


def test_the_lines_that_a_fresh_install_runs() -> None:
    (lines,) = fresh_install.LINES.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    assert lines.count(fresh_install.CHECKPOINT) == 2 and "run.report" in lines


def test_counts_of_a_report(versions: ModuleType, tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="a" name="one"/><testcase classname="a" name="two"><failure/>'
        '</testcase><testcase classname="b" name="three"><skipped/></testcase></testsuite></testsuites>'
    )
    assert versions.counts(report) == (1, ("a::two",), 1)
