"""The command that a board prints for a row asks for the very cells of the row, however they were made."""

import shutil

import pytest
import repeating
from board_cells import under
from prunekit_evals.leaderboard import board, commands, text
from prunekit_evals.run import chosen, reading, settings, stamp
from prunekit_evals.run.settings import Answers, Asked
from prunekit_evals.runner import Plan, Runner, Silent
from prunekit_evals.search import declared
from prunekit_evals.sweep import orders, spec
from prunekit_evals.sweep.orders import Where, ordered

from prunekit.cli.main import main, parser
from prunekit.errors import InputError, SpecError


@pytest.fixture
def evaluated(checkpoint, data_root, tmp_path):
    """Calls `prunekit eval` on the tiny model, and gives the cells."""

    def call(*words, root=data_root):
        source = ("--data-root", str(root)) if root else ()
        out = tmp_path / "out"
        words = ("--model", str(checkpoint), *source, "--device", "cpu", "--no-timing", "--out", str(out), *words)
        assert main(["eval", *words]) == 0
        return reading.read([out]).cells

    return call


def test_rows_of_eval_grids_and_seeds(evaluated, data_root, tmp_path, monkeypatch, capsys):
    words = (
        "--tasks",
        "pope,mme",
        "--limit",
        "2",
        "--subset-seed",
        "5",
        "--system-prompt=-Be brief.",
        "--max-new-tokens",
        "3",
    )
    cells = evaluated("random-r25", "--grid", "stages.0.keep=0.5,0.25", "--seeds", "2", *words)
    said = repeating.check(cells, tmp_path, monkeypatch, data_root=data_root)
    assert len(said) == 5 and sum("prunekit eval random-r25 " in one for one in said) == 1
    assert all(
        "--data-root DIR" in one for one in said
    )  # 24 questions a task are not the bundled benchmark as it comes


def test_rows_of_real_data_and_of_own_tasks(evaluated, own_tasks, data_root, tmp_path, monkeypatch, capsys):
    real = tmp_path / "real"
    shutil.copytree(data_root, real, ignore=shutil.ignore_patterns(stamp.STAMP, ".cache"))
    words = (
        "stride-r11",
        "--dtype",
        "float64",
        "--attn",
        "eager",
        "--batch-size",
        "3",
        "--max-frames",
        "4",
        "--fps",
        "0.5",
    )
    cells = evaluated(*words, "--tasks", "pope", "--limit", "3", root=real)
    (said, _) = repeating.check(cells, tmp_path, monkeypatch, data_root=real)
    assert "--data-root DIR" in said and "--fps 0.5" in said
    cells = [*evaluated(*words, "--tasks", "mine", "--include-path", str(own_tasks), root=None)]
    own = [cell for cell in cells if cell.task == "mine"]
    assert all(
        "--include-path DIR" in one for one in repeating.check(own, tmp_path, monkeypatch, include_path=own_tasks)
    )


def test_chosen_questions_are_asked_in_their_order_and_repeated(evaluated, data_root, tmp_path, monkeypatch, capsys):
    file = tmp_path / "some.json"
    file.write_text(chosen.text({"pope": [7, 2, 5], "gqa": [1]}))
    cells = evaluated("stride-r11", "--tasks", "pope,gqa", "--questions", str(file))
    by_task = {cell.task: [one.number for one in cell.questions] for cell in cells}
    assert by_task == {"pope": [7, 2, 5], "gqa": [1]} and {cell.conditions.limit for cell in cells} == {3}
    said = repeating.check(cells, tmp_path, monkeypatch, data_root=data_root)
    assert all("--questions questions-" in one and "--limit" not in one for one in said)
    fewer = [cell for cell in cells if cell.task == "pope"]
    made = board.of_cells(fewer)
    assert made.sections[0].chosen.text == "" and "since cells failed" in text.markdown(made)


def test_the_bundled_benchmark_as_it_comes_needs_no_folder():
    assert "--data-root" not in commands.command("p", under(model="micro", data=stamp.identity()), ["micro/pope"])
    assert "--data-root DIR" in commands.command("p", under(model="micro", data="older"), ["micro/pope"])


@pytest.mark.parametrize("text, told", [
    ("[1]", "is not a JSON mapping"), ('{"pope": [1, 1]}', "each number once"),
    ('{"pope": []}', "is not a JSON mapping"), ('{"gqa": [1]}', "names no questions of pope"), ("{", "Expecting"),
])  # fmt: skip
def test_a_wrong_file_of_questions_is_refused(text, told, tmp_path):
    file = tmp_path / "q.json"
    file.write_text(text)
    with pytest.raises(InputError, match=told):
        chosen.read(file, ["pope"])


SWEEP = """\
models: {model: MODEL, dtype: bfloat16, attn: eager, batch_size: 3}
tasks: [pope, mine]
data_root: DATA
include_path: own
limit: 2
subset_seed: 1
unanswered: fail
max_frames: 4
fps: 1.5
system_prompt: Be brief.
budgets: [{layer_mean: 0.8}]
seeds: 2
pipelines:
  - {name: early, stages: [{use: random, at: 1}]}
"""


def test_rows_of_a_sweep_which_says_all_that_eval_says(checkpoint, data_root, own_tasks, tmp_path, monkeypatch):
    path = tmp_path / "sweep.yaml"
    path.write_text(SWEEP.replace("MODEL", str(checkpoint)).replace("DATA", str(data_root)))
    monkeypatch.chdir(own_tasks)  # paths start at the file, not here
    (order,) = ordered(spec.load(path), Where(tmp_path / "out")).orders
    plan = orders.plan_of(order, "cpu")
    assert (plan.unanswered, plan.max_frames, plan.fps, plan.subset_seed) == ("fail", 4, 1.5, 1)
    cells = Runner(plan, Silent()).run().cells
    assert len(cells) == 6 and not [cell.error for cell in cells if cell.error]
    said = repeating.check(cells, tmp_path, monkeypatch, data_root=data_root, include_path=own_tasks)
    assert len(said) == 6


def test_what_is_wrong_with_settings_of_a_sweep_is_told_at_its_place(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text("models: m\ntasks: t\npipelines: p\nsubset_seed: -1\nfps: 0\nmax_frames: 0\nunanswered: maybe\n")
    with pytest.raises(SpecError) as caught:
        spec.load(path)
    said = str(caught.value)
    for told in (
        "s.yaml:4:14: subset_seed: must be at least 0, not -1", "s.yaml:5:6: fps: must be above 0, not 0",
        "s.yaml:6:13: max_frames: must be at least 1, not 0", "s.yaml:7:13: unanswered: must be 'wrong' or 'fail'",
    ):  # fmt: skip
        assert told in said, said
    path.write_text("models: m\ntasks: t\npipelines: p\nsubset_seed: 1\n")
    with pytest.raises(SpecError, match="subset_seed: draws the questions of `limit`, which is not there"):
        spec.load(path)


def test_a_setting_is_declared_once_for_eval_sweep_and_search():
    asked = parser().parse_args(["eval", "--model", "m", "--tasks", "t"])
    usual = Plan("m", (), (), None, None)
    for name in settings.names(Asked):
        assert getattr(asked, name) == getattr(usual, name), name
    assert set(settings.names(Asked)) <= {*spec.TOP_KEYS, *spec.MODEL_KEYS, "device"}
    assert set(settings.names(Answers)) <= set(settings.names(declared.Settings)) & set(
        vars(parser().parse_args(["search"]))
    )
