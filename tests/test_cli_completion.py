"""Completion in a real bash: what TAB offers after `prunekit ...`."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from prunekit.cli import main

ASK = """
source {script}
COMP_WORDS=({words}); COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 )); COMPREPLY=()
$(complete -p prunekit | sed 's/.*-F \\([^ ]*\\).*/\\1/')
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


def script(capsys: pytest.CaptureFixture[str], shell: str) -> str:
    assert main.main(["completion", shell]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("tr", {"trace", "train"}),
        ("show fastv-k2-r1", {"fastv-k2-r11"}),
        ("eval dense div", {"divprune-r11"}),
        ("trace dense --thumb", {"--thumbnails"}),
        ("list str", {"strategies"}),
        ("show ./mi", {"./mine.yaml"}),
    ],
)
def test_bash(capsys: pytest.CaptureFixture[str], tmp_path: Path, typed: str, offered: set[str]) -> None:
    bash = shutil.which("bash")
    assert bash is not None
    path = tmp_path / "completion.bash"
    path.write_text(script(capsys, "bash"))
    (tmp_path / "mine.yaml").touch()
    asked = [bash, "-c", ASK.format(script=path, words=f"prunekit {typed}")]
    out = subprocess.run(asked, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert set(out.stdout.split()) == offered, out.stderr


def test_other_shells_and_none(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "#compdef prunekit" in script(capsys, "zsh") and "divprune-r11" in script(capsys, "zsh")
    assert "complete prunekit" in script(capsys, "tcsh")
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main.main(["completion", "bash"]) == 2
    assert "pip install 'prunekit[completion]'" in capsys.readouterr().err
