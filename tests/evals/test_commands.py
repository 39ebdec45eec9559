"""`prunekit eval`, `compare` and `demo` as a user calls them."""

import json
import subprocess
import sys

import pytest
from prunekit_evals.cli import arguments, commands
from prunekit_evals.lmms import tasks
from prunekit_evals.run.variants import Variation

from prunekit.cli.main import main
from prunekit.errors import InputError, SpecError

FASTV = {"use": "fastv", "at": 2, "keep": 0.25}


def call(*words):
    return main([str(word) for word in words])


def options(checkpoint, data_root, tmp_path):
    common = ("--model", checkpoint, "--data-root", data_root, "--out", tmp_path / "out", "--device", "cpu")
    return (*common, "--limit", 6, "--no-timing")


def test_eval_and_compare(checkpoint, data_root, pipeline_file, tmp_path, capsys):
    path = pipeline_file("fastv", FASTV)
    given = options(checkpoint, data_root, tmp_path)
    assert call("eval", path, "--tasks", "pope,mme", *given) == 0
    said = capsys.readouterr()
    assert "micro/" in said.out and "fastv" in said.out and "dense" in said.out
    assert "4 results computed, 0 reused" in said.err
    assert call("eval", path, "--tasks", "pope,mme", *given, "--json") == 0
    said = capsys.readouterr()
    data = json.loads(said.out)
    assert (data["computed"], data["there_before"], data["failed"]) == (0, 4, 0)
    assert {(one["task"], one["pipeline"]) for one in data["cells"]} == {
        (task, name) for task in ("micro/pope", "micro/mme") for name in ("dense", "fastv")
    }
    assert call("compare", tmp_path / "out", "--json") == 0
    (only,) = json.loads(capsys.readouterr().out)
    assert [row["pipeline"] for row in only["rows"]] == ["dense", "fastv"]
    assert call("compare", tmp_path / "out", "--markdown") == 0
    assert "| dense |" in capsys.readouterr().out
    assert call("compare", tmp_path / "out") == 0
    assert "Pipeline" in capsys.readouterr().out


def test_failed_cells_end_with_1(checkpoint, data_root, pipeline_file, tmp_path, capsys):
    root = tmp_path / "root"
    (root / "lmms-lab-encoder").mkdir(parents=True)
    (root / "lmms-lab-encoder" / "POPE").symlink_to(data_root / "lmms-lab-encoder" / "POPE")
    assert call("eval", "--tasks", "mme,pope", *options(checkpoint, root, tmp_path)) == 1
    said = capsys.readouterr()
    assert "1 failed" in said.err and "which is not there" in said.err
    assert "Traceback" not in said.err
    assert "pope" in said.out


def test_wrong_input_ends_with_2_before_any_compute(
    checkpoint, data_root, pipeline_file, tmp_path, capsys, monkeypatch
):  # fmt: skip
    monkeypatch.setattr("prunekit.loading.load", lambda *args: pytest.fail("the model was loaded"))
    good = pipeline_file("good", FASTV)
    bad = pipeline_file("bad", {"use": "fastw", "keep": 0.5})
    far = pipeline_file("far", {**FASTV, "at": 50})
    namesake = tmp_path / "namesake.yaml"
    namesake.write_text(json.dumps({"name": "good", "stages": [{**FASTV, "keep": 0.5}]}))
    given = options(checkpoint, data_root, tmp_path)
    for words, expected in (
        ((good, "--tasks", "popee"), "did you mean 'pope'"),
        ((good, "--tasks", " , "), "names no task"),
        ((good, "--tasks", "mmbench"), "is a group"),
        ((bad, "--tasks", "pope"), "did you mean 'fastv'"),
        ((far, "--tasks", "pope"), "no layer 50"),
        ((good, namesake, "--tasks", "pope"), "two pipelines are called 'good'"),
        (("--tasks", "pope", "--no-dense"), "nothing to evaluate"),
    ):
        assert call("eval", *words, *given) == 2, words
        said = capsys.readouterr()
        assert expected in said.err, words
        assert "Traceback" not in said.err
    assert call("eval", good, "--tasks", "pope", "--model", "mikro") == 2
    assert "did you mean 'micro'" in capsys.readouterr().err
    assert call("eval", good, "--tasks", "pope", "--model", checkpoint, "--data-root", tmp_path / "x") == 2
    assert "not a folder" in capsys.readouterr().err
    for bundled in tasks.BUNDLED:
        assert call("eval", good, "--tasks", "docvqa_val", "--model", bundled, "--out", tmp_path) == 2
        assert "the bundled benchmark has no task 'docvqa_val'" in capsys.readouterr().err
    assert call("compare", tmp_path / "nothing") == 2
    assert "no results folder" in capsys.readouterr().err
    for limit in ("0", "-3", "0.5", "ten"):
        with pytest.raises(SystemExit) as stopped:
            call("eval", good, "--tasks", "pope", "--model", "micro", "--limit", limit)
        assert stopped.value.code == 2
        assert "whole number" in capsys.readouterr().err


def test_several_processes_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert call("eval", "--tasks", "pope", "--model", "micro", "--out", tmp_path) == 2
    assert "torchrun" in capsys.readouterr().err


def test_every_fault_of_every_file_is_said(pipeline_file):
    files = [pipeline_file("one", {"use": "fastw", "keep": 0.5}), pipeline_file("two", {**FASTV, "keep": 7})]
    with pytest.raises(SpecError) as caught:
        commands.load_all([str(file) for file in files], Variation(), dense=True)
    assert "one.yaml" in str(caught.value) and "two.yaml" in str(caught.value)


def test_dense_comes_first_and_once(pipeline_file):
    fastv, dense = str(pipeline_file("fastv", FASTV)), str(pipeline_file("plain", {"use": "dense"}))
    assert [one.name for one in commands.load_all([fastv], Variation(), dense=True)] == ["dense", "fastv"]
    assert [one.name for one in commands.load_all([fastv, dense], Variation(), dense=True)] == ["fastv", "plain"]
    assert [one.name for one in commands.load_all([fastv, fastv], Variation(), dense=False)] == ["fastv"]


def test_overrides_reach_every_pipeline(pipeline_file):
    (one,) = commands.load_all([str(pipeline_file("fastv", FASTV))], Variation(("stages[0].keep=0.5",)), dense=False)
    assert "keep: 0.5" in one.resolved


def test_the_demo_has_what_it_needs_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = commands.load_all(commands.DEMO_PIPELINES, Variation(), dense=True)
    assert [one.name for one in found] == list(commands.DEMO_PIPELINES)
    assert len(commands.DEMO_PIPELINES) >= 7  # dense and at least six more
    assert len(commands.DEMO_TASKS) >= 3
    assert len(tasks.find(commands.DEMO_TASKS)) == len(commands.DEMO_TASKS)


def test_what_calls_itself_dense_and_is_not_is_told_why(pipeline_file):
    """The unpruned model, which is put beside, comes from no file that could be named in a message."""
    false = str(pipeline_file("dense", FASTV))
    with pytest.raises(InputError, match=r"dense\.yaml is called 'dense', .* unpruned model .*--no-dense"):
        commands.load_all([false], Variation(), dense=True)
    assert [one.name for one in commands.load_all([false], Variation(), dense=False)] == ["dense"]


def test_the_commands_cost_nothing_until_they_run():
    code = (
        "import sys\n"
        "from prunekit.cli.main import parser\n"
        "assert {'eval', 'compare', 'demo'} <= set(parser()._subparsers._group_actions[0].choices)\n"
        "heavy = {'torch', 'lmms_eval', 'rich', 'transformers', 'datasets', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_numbers_are_read_strictly():
    assert arguments.positive("12") == 12
    for text in ("0", "-1", "1.5", "", "²", "1e3"):
        with pytest.raises(arguments.argparse.ArgumentTypeError):
            arguments.positive(text)


def test_without_scipy_nothing_is_begun(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(commands, "find_spec", lambda name: None if name == "scipy" else object())
    for words in (("compare", tmp_path), ("eval", "dense", "--model", "micro", "--tasks", "pope", "--out", tmp_path)):
        assert call(*words) == 2
        assert "intervals and tests need scipy: pip install 'prunekit[evals]'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
