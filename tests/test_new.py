"""`prunekit new`: what it writes passes its own tests, and what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from prunekit import plugins
from prunekit.cli import main, new


@pytest.fixture(autouse=True)
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder to write into."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    plugins.reset()


def generate(kind: str, *arguments: str) -> Path:
    assert main.main(["new", f"fresh_{kind}", "--kind", kind, *arguments]) == 0
    return Path(f"fresh_{kind}")


def python(*arguments: str, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=280, env=os.environ | variables
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_kind_passes_its_own_tests(desk: Path) -> None:
    """With warnings as errors; all in one process, to save the time of starting more."""
    folders = [generate(kind, *(["--paper", "arXiv:2403.06764v2"] if kind == "token" else [])) for kind in new.KINDS]
    paths = "\n  ".join(f"{folder}/src" for folder in folders)
    (desk / "pytest.ini").write_text(f"[pytest]\npythonpath =\n  {paths}\n")
    out = python("-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", "-p", "no:randomly", "-n", "0",
                 *(f"{folder}/tests" for folder in folders))  # fmt: skip
    assert int(out.split(" passed")[0].split()[-1]) >= 30 and "skipped" not in out
    text = (desk / "fresh_token/src/fresh_token/strategy.py").read_text()
    assert '@strategy(paper="2403.06764v2", per_sample=True)' in text
    assert "https://arxiv.org/abs/2403.06764v2" in text


@pytest.mark.parametrize("kind", new.KINDS)
def test_it_is_well_written(desk: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It compiles, its configuration points at what is there, and nothing of the templates is left over."""
    folder = generate(kind, "--paper", "2403.06764")
    said = capsys.readouterr().out
    assert f"prunekit --plugin {folder}/src/{folder} show {folder} --model micro" in said
    files = {str(one.relative_to(folder)) for one in folder.rglob("*") if one.is_file()}
    assert files == {name.format(name=folder) for name in new.FILES}
    for file in files:
        text = (folder / file).read_text()
        if file.endswith(".py"):
            compile(text, file, "exec")
        assert max(map(len, text.splitlines())) <= 125 and text.endswith("\n"), file
        assert "$" not in text.replace("$ prunekit", "").replace("$ pytest", "").replace("$PWD", ""), file
    told = tomllib.loads((folder / "pyproject.toml").read_text())
    assert told["project"]["entry-points"]["prunekit"] == {f"fresh_{kind}": f"fresh_{kind}"}


def test_its_pipeline_goes_by_name(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The folder as it is, not installed; that it has the pipeline's name itself is in nobody's way."""
    folder = generate("token")
    capsys.readouterr()
    assert main.main(["--plugin", f"{folder}/src/{folder}", "show", str(folder), "--resolved"]) == 0
    assert f"use: {folder}" in capsys.readouterr().out
    sys.modules.pop(str(folder)), sys.modules.pop(f"{folder}.strategy")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["My-Idea"], "'My-Idea' is no name for a package: lower-case letters, digits and '_', such as 'my_idea'"),
        (["2fast"], "no name for a package: lower-case letters, digits and '_', such as 'my_idea'"),
        (["class"], "'class' is no name for a package"),
        (["there"], "there exists: choose another name, or remove it first"),
        (["fastv"], "has a strategy 'fastv': choose another name, such as 'my_fastv'"),
        (["blind"], "has a strategy 'blind'"),
        (["torch"], "Python has a module 'torch' ("),
        (["fine", "--paper", "2413.06764"], "'2413.06764' is no arXiv id: write one such as 2403.06764"),
        (["fine", "--paper", "https://openreview.net/x"], "is no arXiv id"),
    ],
    ids=lambda value: "-".join(value).replace("/", "") if isinstance(value, list) else "",
)
def test_refusals_write_nothing(
    desk: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    (desk / "there").mkdir()
    assert main.main(["new", *arguments]) == 2
    assert said in capsys.readouterr().err
    assert [one.name for one in desk.iterdir()] == ["there"]


@pytest.mark.slow
def test_it_installs_and_is_found(desk: Path) -> None:
    """Built and installed by pip into a folder of its own; its own tests pass where it is an installed plugin."""
    folder = generate("token")
    python("-m", "pip", "install", "-q", "--no-input", "--disable-pip-version-check", "--no-index", "--no-deps",
           "--no-build-isolation", "--target", "site", f"./{folder}")  # fmt: skip
    site = str(desk / "site")
    listed = python("-m", "prunekit", "list", "plugins", PYTHONPATH=site)
    assert "fresh_token  prunekit_pipelines, prunekit_register  [fresh-token 0.1.0]" in listed
    assert "use: fresh_token" in python("-m", "prunekit", "show", "fresh_token", "--resolved", PYTHONPATH=site)
    (desk / "pytest.ini").write_text("[pytest]\n")
    out = python("-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", "-p", "no:randomly", "-n", "0",
                 f"{folder}/tests", "-c", "pytest.ini", PYTHONPATH=site)  # fmt: skip
    assert " passed" in out
