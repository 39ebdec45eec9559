"""`prunekit leaderboard` as a user calls it."""

import json
import math
import os
import stat
import subprocess
import sys

import pytest
from board_cells import cell, complete, dense, under, written
from prunekit_evals.cli import leaderboard
from prunekit_evals.leaderboard import bundle
from rich.console import Console

from prunekit.cli.main import main


@pytest.fixture(autouse=True)
def light(monkeypatch):
    """Without the megabyte that draws."""
    monkeypatch.setattr(bundle, "bundle", lambda: "window.vegaEmbed = null;")
    monkeypatch.setenv("COLUMNS", "120")


def call(*words):
    return main(["leaderboard", *map(str, words)])


def test_terminal_page_and_markdown(tmp_path, capsys):
    folder = written(tmp_path / "results", complete("pope", "gqa"))
    page, markdown = tmp_path / "board.html", tmp_path / "board.md"
    assert call(folder, "-o", page, "--markdown", markdown) == 0
    said = capsys.readouterr()
    assert "Pipeline" in said.out and "ours" in said.out and "skipped" not in said.err
    assert f"page: {page} (0.0" in said.err
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>") and "| ours |" in markdown.read_text()
    assert {stat.S_IMODE(one.stat().st_mode) for one in (page, markdown)} == {0o644}
    before = page.read_bytes()
    assert call(folder, "-o", page) == 0 and page.read_bytes() == before  # the same cells, the same page
    assert sorted(one.name for one in tmp_path.iterdir()) == ["board.html", "board.md", "results"]


def test_a_narrow_terminal_says_what_it_hides(tmp_path, capsys, monkeypatch):
    folder = written(tmp_path, complete("pope", "gqa", "mme"))
    monkeypatch.setattr("prunekit_evals.cli.commands.console", lambda: Console(width=70))
    assert call(folder) == 0
    assert "hidden, for lack of width: " in capsys.readouterr().out


def test_what_is_skipped_is_named_and_counted(tmp_path, capsys):
    folder = written(tmp_path, [dense(), cell("p")])
    (folder / "pope.0123456789.json").write_text("{")
    (folder / "notes.txt").write_text("x")
    assert call(folder) == 0
    said = capsys.readouterr()
    assert "skipped:" in said.err and "notes.txt: no result of `prunekit eval`" in said.err
    assert said.err.endswith("2 cells on the board, 2 files skipped (named above)\n")
    assert "no random row" in said.out


def test_wrong_input_ends_with_2_and_says_what_to_do(tmp_path, capsys):
    good = written(tmp_path / "good", [dense()])
    empty = tmp_path / "empty"
    empty.mkdir()
    other = tmp_path / "other"
    other.mkdir()
    (other / "pope.0123456789.json").write_text(json.dumps({**dense().to_json(), "schema": 9}))
    score = dense().to_json()
    score["questions"] = [{**one, "score": math.nan} for one in score["questions"]]
    (tmp_path / "nan").mkdir()
    (tmp_path / "nan" / "pope.0123456789.json").write_text(json.dumps(score))
    page = tmp_path / "b.html"
    for words, expected in (
        ((tmp_path / "nowhere",), "no results folder"),
        ((empty,), f"nothing to rank under '{empty}' (make results with `prunekit eval`)"),
        ((other,), "not a cell of schema 1"),
        ((other,), "1 files skipped"),
        ((tmp_path / "nan",), "questions[0].score is nan"),
        ((good, "-o", tmp_path / "b.pdf"), "name a file that ends in .html"),
        ((good, "--markdown", tmp_path / "b.html"), "name a file that ends in .md"),
        ((good, "-o", tmp_path / "no" / "b.html"), "there is no folder"),
        ((good, "-o", tmp_path / "good" / "x" / ".." / ".." / "dir.html"), "there is no folder"),
        ((good, tmp_path / "gone", "-o", page), "no results folder"),
    ):
        assert call(*words) == 2, words
        said = capsys.readouterr()
        assert expected in said.err and "Traceback" not in said.err, (words, said.err)
    (tmp_path / "folder.html").mkdir()
    assert call(good, "-o", tmp_path / "folder.html") == 2
    assert "that is a folder" in capsys.readouterr().err
    assert not page.exists()
    for words in (("--limit", "3"), ("-o",)):
        with pytest.raises(SystemExit) as stopped:
            call(good, *words)
        assert stopped.value.code == 2


def test_a_target_that_cannot_be_written_is_said(tmp_path, capsys, monkeypatch):
    folder = written(tmp_path / "results", [dense()])

    def refuse(*names):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    assert call(folder, "-o", tmp_path / "b.html") == 2
    assert "b.html' cannot be written: Permission denied (name another file)" in capsys.readouterr().err
    assert [one.name for one in tmp_path.iterdir()] == ["results"]


def test_mixed_models_and_no_dense_row_are_shown_and_said(tmp_path, capsys):
    folder = written(tmp_path, [cell("p"), cell("q", conditions=under(model="b"))])
    assert call(folder) == 0
    said = capsys.readouterr().out
    assert "org/model (abc)" in said and "b (abc)" in said and said.count("note: no dense row, which every") == 2


def test_without_what_draws_the_page_is_refused_and_the_tables_are_not(tmp_path, capsys, monkeypatch):
    import importlib.util

    folder = written(tmp_path / "results", [dense()])
    usual = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "vl_convert" else usual(name))
    assert call(folder, "-o", tmp_path / "b.html") == 2
    assert "the page needs vl_convert: pip install 'prunekit[leaderboard]'" in capsys.readouterr().err
    assert call(folder, "--markdown", tmp_path / "b.md") == 0


def test_a_page_that_is_too_large_is_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("prunekit_evals.leaderboard.page.LIMIT", 1_000)
    assert call(written(tmp_path / "results", [dense()]), "-o", tmp_path / "b.html") == 0
    assert "rank fewer folders at once" in capsys.readouterr().err


def test_help_says_what_it_does_and_imports_nothing_heavy():
    code = (
        "import sys\n"
        "from prunekit.cli.main import parser\n"
        "parser()._subparsers._group_actions[0].choices['leaderboard'].print_help()\n"
        "assert not {'torch', 'altair', 'jinja2', 'numpy', 'yaml', 'vl_convert'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True, text=True)
    assert "examples:" in done.stdout and "--markdown" in done.stdout
    assert leaderboard.EXAMPLES.splitlines()[1].strip() in done.stdout
