"""What `make check` runs, and the files by which a public host and releases work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import changed
import pytest
import yaml

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("file", "test"),
    [
        ("prunekit/trace/png.py", "tests/trace/test_drawing.py"),
        ("prunekit/strategy/meant.py", "tests/strategy/test_meant.py"),
        ("evals/compare/judging.py", "tests/evals/test_verdicts.py"),
        ("strategies/fastv.py", "tests/engine/test_numerics.py"),
        ("tests/tiny_checkpoint.py", "tests/test_cli_trace.py"),
        ("docs/run.md", "tests/test_docs.py"),
        ("prunekit/__init__.py", "tests/engine/test_exactness.py"),
    ],
)
def test_a_change_has_its_tests(file: str, test: str) -> None:
    assert test in changed.tests_of([file])


def test_changed_tests_come_first_and_removed_ones_do_not() -> None:
    chosen = changed.tests_of(["prunekit/cli/main.py", "tests/test_gone.py", "tests/test_registry.py"])
    assert chosen[:2] == ["tests/test_imports.py", "tests/test_registry.py"] and "tests/test_gone.py" not in chosen


@pytest.mark.parametrize("package", changed.PACKAGES)
def test_every_module_has_tests(package: str) -> None:
    """A change that no test would run for is a hole in `make check`."""
    files = [path.relative_to(ROOT) for path in (ROOT / package).rglob("*.py") if not path.stem.startswith("__")]
    tests, users = {path: changed._names(ROOT / path) for path in _tests()}, changed._users()
    without = [file for file in files if not changed._naming(changed._module(file), tests, users)]
    assert [str(file) for file in without] == []


def _tests() -> list[str]:
    return [path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob("tests/**/test_*.py"))]


def test_the_workflow_runs_the_check_of_any_machine() -> None:
    data = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    steps = data["jobs"]["test"]["steps"]
    assert any(step.get("run") == ".ci/run" for step in steps)
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert all(repository["repo"] in ("local", "meta") for repository in hooks["repos"])  # nothing is fetched


def test_changes_are_of_a_known_kind_and_can_be_written(tmp_path: Path) -> None:
    kinds = ("added", "changed", "fixed", "deprecated")
    folder = ROOT / ".changes"
    files = [path for path in folder.iterdir() if path.name not in ("README.md", "template.md")]
    assert all(path.suffix == ".md" and path.stem.rpartition(".")[2] in kinds for path in files)
    words = [sys.executable, "-m", "towncrier", "build", "--draft", "--version", "9.9.9", "--config", "pyproject.toml"]
    made = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0 and "9.9.9" in made.stdout, made.stderr
