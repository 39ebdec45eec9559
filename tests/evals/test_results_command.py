"""`prunekit results` as a user calls it, on sound and on damaged folders."""

import csv
import dataclasses
import io
import json

import pandas
import pytest
from board_cells import cell, dense, written
from prunekit_evals.run import results
from prunekit_evals.run.results import Executed, Foretold, Question

from prunekit.cli.main import main


def call(*words):
    return main([str(word) for word in words])


QUESTIONS = (
    Question(0, '=1+1, "yes"', 1.0, "a", "q0", "Is it?\nReally?", "yes"), Question(3, "", None, error="lost"),
)  # fmt: skip
OURS = dataclasses.replace(
    cell("ours", created="2"), questions=QUESTIONS, metrics={"accuracy,none": 1.0},
    executed=Executed((9.5, 4.0), 2.0, 1), foretold=Foretold((1, 2), (9, 4)),
)  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    return written(tmp_path / "results", [OURS, dense()])


def test_csv_has_a_row_for_each_cell_or_question(folder, capsys):
    assert call("results", folder) == 0
    theirs, ours = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert (theirs["pipeline.name"], ours["pipeline.name"], ours["conditions.limit"]) == ("dense", "ours", "100")
    assert (ours["accuracy"], ours["questions"], ours["scored"], ours["unanswered"]) == ("1.0", "2", "1", "1")
    assert json.loads(ours["executed.layer_tokens"]) == [9.5, 4.0] and theirs["executed.layer_tokens"] == ""
    assert ours["metrics.accuracy,none"] == "1.0" and ours["pipeline.resolved"] == OURS.pipeline.resolved
    assert call("results", folder, "--questions") == 0
    *_, first, last = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert (first["document"], first["text"], first["answer"]) == ("q0", "Is it?\nReally?", '=1+1, "yes"')
    assert (last["number"], last["score"], last["error"], last["pipeline"]) == ("3", "", "lost", "ours")


def test_parquet_and_json_hold_the_same(folder, tmp_path, capsys):
    for words, columns in (((), ("id", "accuracy")), (("--questions",), ("cell", "number", "text", "answer"))):
        assert call("results", folder, *words, "--parquet", tmp_path / "a.parquet") == 0
        assert call("results", folder, *words, "--json", tmp_path / "a.json") == 0
        table, rows = pandas.read_parquet(tmp_path / "a.parquet"), json.loads((tmp_path / "a.json").read_text())
        assert len(table) == len(rows) and list(table.columns) == list(rows[0])
        assert f"{len(rows)} rows: {tmp_path}/a.json" in capsys.readouterr().err
        for column in columns:
            assert table[column].tolist() == [row[column] for row in rows], column
    assert rows[-2]["score"] == 1.0 and rows[-1]["score"] is None


def test_a_folder_of_damaged_results_is_read_for_what_is_sound(folder, tmp_path, capsys):
    whole = json.dumps(OURS.to_json())
    damaged = {
        "half.0123456789.json": whole[:700], "empty.0123456789.json": "", "noise.0123456789.json": "\x00\x01",
        "newer.0123456789.json": whole.replace('"schema": 1', '"schema": 2'),
        "foreign.0123456789.json": '{"results": {"pope": 1}}', "foreign.csv": "a,b", "list.0123456789.json": "[1]",
        "score.0123456789.json": whole.replace('"score": 1.0', '"score": 7.0'),
        "layers.0123456789.json": whole.replace("[9.5, 4.0]", '"many"'),
    }  # fmt: skip
    for name, text in damaged.items():
        (folder / name).write_text(text)
    (folder / "latin.0123456789.json").write_bytes(whole.replace("yes", "n\xf6").encode("latin-1"))
    (folder / "dir.0123456789.json").mkdir()
    commands = [("results", folder), ("compare", folder, "--json"), ("leaderboard", folder)]
    for words in commands:
        assert call(*words) == 0, words
        said = capsys.readouterr()
        assert "ours" in said.out and "Traceback" not in said.err
        for name in (*damaged, "latin.0123456789.json"):
            assert f"skipped: {folder}/{name}: " in said.err, (words, name)
    assert "newer.0123456789.json: not a cell of schema 1: kind 'prunekit-cell', schema 2; a newer" in said.err


def test_surrogates_of_foreign_data_are_written_and_read_back(tmp_path, capsys):
    odd = dataclasses.replace(OURS, questions=(dataclasses.replace(QUESTIONS[0], text="a\ud800b"),))
    path = results.path_of(tmp_path, odd)
    results.write(path, odd)
    assert results.read(path) == odd
    for target in ("--csv", "--parquet", "--json"):
        assert call("results", tmp_path, "--questions", target, tmp_path / f"x{target}") == 0
    assert "a\\ud800b" in (tmp_path / "x--csv").read_text()


def test_wrong_input_ends_with_2(folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for words, expected in (
        ((tmp_path / "nowhere",), "no results folder"),
        ((tmp_path / "empty",), "no results under"),
        ((folder, "--csv", tmp_path), "that is a folder"),
        ((folder, "--json", tmp_path / "no" / "x.json"), "there is no folder"),
        ((folder, "--parquet", "/dev/full/x"), "there is no folder"),
    ):
        assert call("results", *words) == 2, words
        assert expected in capsys.readouterr().err
