"""Plugins without packaging: files and folders that `--plugin` or PRUNEKIT_PLUGINS names, and blocking by `-p no:`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from prunekit import loose, plugins
from prunekit.cli import main
from prunekit.errors import PrunekitWarning

MINE = """\
from pathlib import Path

from prunekit import hookimpl, strategy


@strategy()
class Mine:
    @hookimpl
    def score_tokens(self, hidden):
        return hidden.norm(dim=-1)


@hookimpl
def prunekit_register(registry):
    registry.strategy("{name}", "{name}:Mine", summary="mine")


@hookimpl
def prunekit_pipelines():
    return {{"{name}-half": Path(__file__).with_name("half.yaml")}}
"""


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No plugin from the environment; the manager and the modules of a test are forgotten after it."""
    monkeypatch.delenv(plugins.LOOSE, raising=False)
    modules = set(sys.modules)
    plugins.reset()
    loose.digest.cache_clear()
    yield
    plugins.reset()
    for name in set(sys.modules) - modules:
        if name.startswith("loose_"):
            del sys.modules[name]


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A loose plugin with a strategy and a pipeline."""
    (tmp_path / "half.yaml").write_text("name: loose_mine-half\nstages: [{use: loose_mine, keep: 0.5}]\n")
    return written(tmp_path, "loose_mine", MINE.format(name="loose_mine"))


def written(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / f"{name}.py"
    file.write_text(text)
    return file


def strategies() -> set[str]:
    return {entry.name for entry in plugins.registry().strategies()}


def told(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> tuple[str, str]:
    assert main.main([str(one) for one in arguments]) == code
    return capsys.readouterr()


def test_the_option_loads_a_file_for_one_call(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = dict(os.environ)
    out, err = told(capsys, "--plugin", mine, "show", "loose_mine-half", "--json")
    assert json.loads(out)["name"] == "loose_mine-half" and err == ""
    rows = json.loads(told(capsys, f"--plugin={mine}", "list", "plugins", "--json")[0])["plugins"]
    row = next(one for one in rows if one["name"] == "loose_mine")
    assert (row["origin"], row["file"]) == (f"loose_mine.py {loose.digest(mine)}", str(mine))
    assert row["version"] == loose.digest(mine) and row["hooks"] == ["prunekit_pipelines", "prunekit_register"]
    assert f"[loose_mine.py {row['version']}]  {mine}" in told(capsys, "-p", mine, "list", "plugins")[0]
    assert "loose_mine" not in strategies() and dict(os.environ) == before


def test_the_contents_are_the_version(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else results of a file that was edited since would pass for its own."""
    first = loose.digest(mine)
    mine.write_text(mine.read_text() + "# more\n")
    assert loose.digest(mine) == first, "this process has imported the file as it was"
    loose.digest.cache_clear()
    assert loose.digest(mine) != first


def test_the_environment_loads_files_and_folders(mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "loose_folder"
    written(folder, "__init__", MINE.replace(":Mine", ".part:Mine").format(name="loose_folder"))
    written(folder, "part", MINE.format(name="loose_folder"))
    written(folder, "half", "")
    monkeypatch.setenv(plugins.LOOSE, os.pathsep.join(map(str, (mine, folder, mine))))
    assert {"loose_mine", "loose_folder"} <= strategies()
    assert plugins.registry().get_strategy("loose_folder").__module__ == "loose_folder.part"
    assert plugins.names().count("loose_mine") == 1
    assert plugins.register(sys.modules["loose_mine"], "mine") == "loose_mine"


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("loose_exits", "raise SystemExit(3)", "it does not import: SystemExit: it calls sys.exit: 3 at "),
        ("loose_typo", "def f(:", "SyntaxError"),
        ("loose_idle", "x = 1", "it implements no hook: `prunekit_register`, under @hookimpl"),
        ("loose-name", "x = 1", "'loose-name' is no name for a Python module: rename it"),
        ("json", "x = 1", "'json' is also the name of a module at "),
        ("loose_more", MINE.format(name="fastv!"), "strategy name 'fastv!' must be lower-case"),
    ],
)
def test_a_broken_file_is_listed_and_stops_nothing_else(
    mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, text: str, said: str
) -> None:
    file = written(tmp_path / "other", name, text)
    out, err = told(capsys, "-p", file, "-p", mine, "list", "plugins", "--json")
    rows = {row["name"]: row for row in json.loads(out)["plugins"]}
    assert said in rows[name]["broken"] and rows[name]["file"] == str(file) and rows[name]["hooks"] == []
    assert not rows["loose_mine"]["broken"] and not rows["strategies"]["broken"]
    assert f"warning: plugin '{name}' of {rows[name]['origin']} is left out: " in err and err.count("\n") == 1
    assert name == "json" or name not in sys.modules or said.startswith(("it implements", "strategy"))


def test_a_missing_file(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a call it is an error, of the environment a warning."""
    assert "there is no such file or folder" in told(capsys, "-p", tmp_path / "no.py", "list", code=2)[1]
    monkeypatch.setenv(plugins.LOOSE, str(tmp_path / "no.py"))
    with pytest.warns(PrunekitWarning, match=r"plugin 'no' of no.py is left out: there is no file .*no\.py"):
        assert "fastv" in strategies()


def test_two_files_with_one_name(mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    second = written(tmp_path / "second", "loose_mine", MINE.format(name="loose_second"))
    monkeypatch.setenv(plugins.LOOSE, os.pathsep.join(map(str, (mine, second))))
    with pytest.warns(PrunekitWarning, match="is left out: loose_mine.py [0-9a-f]+ has a plugin of that name"):
        assert "loose_second" not in strategies()
    assert "loose_mine" in strategies()


def test_blocking(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = told(capsys, "-p", mine, "-p", "no:loose_mine", "-p", "no:strategies", "list", "--json")
    listed = json.loads(out)
    assert {row["name"] for row in listed["plugins"]}.isdisjoint({"loose_mine", "strategies"})
    assert listed["strategies"] == [] and "loose_mine" not in sys.modules
    said = told(capsys, "-p", "no:strategie", "list", code=2)[1]
    assert "no plugin has this name (did you mean 'strategies'?" in said


def test_behind_the_command_it_says_where_it_belongs(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main.main(["list", "--plugin", str(mine)])
    assert "stand before the command: prunekit --plugin ./mine.py eval" in capsys.readouterr().err


def test_lmms_eval_finds_it_through_the_environment(mine: Path) -> None:
    """The adapter builds its pipeline in whichever process lmms-eval runs: what it calls there, in a process anew."""
    code = "from prunekit.pipeline.build import build; print(build('loose_mine-half').stages[0].origin)"
    environment = {**os.environ, plugins.LOOSE: str(mine)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)
    assert done.stdout.startswith("loose_mine.py "), done.stderr
