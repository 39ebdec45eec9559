"""Whole runs over lmms-eval's own tasks: cells, skipping, failures, kills, caches."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image
from prunekit_evals import runner
from prunekit_evals.compare import tables
from prunekit_evals.lmms import harness, tasks
from prunekit_evals.run import answering, likelihoods, results
from prunekit_evals.run.answering import Tally
from prunekit_evals.run.journal import Answer, Facts, Journal
from prunekit_evals.run.prompts import Prompt
from prunekit_evals.runner import Plan, Runner

import prunekit
from prunekit.errors import InputError, PrunekitWarning, SpecError

DENSE = {"name": "dense", "stages": [{"use": "dense"}]}
FASTV = {"name": "fastv", "stages": [{"use": "fastv", "at": 2, "keep": 0.25}]}
BLIND = {"name": "blind", "stages": [{"use": "blind"}]}


class Quiet:
    """Progress that keeps what it was told."""

    def __init__(self):
        self.cells, self.started, self.answered, self.ended = 0, [], 0, []

    def begin(self, cells):
        self.cells = cells

    def cell(self, pipeline, task, questions):
        self.started.append((task, pipeline, questions))

    def advance(self, questions):
        self.answered += questions

    def end(self, cell):
        self.ended.append(cell)


@pytest.fixture
def plan(checkpoint, data_root, tmp_path):
    """A plan over the tiny model: `plan("pope", FASTV, limit=6)`."""

    def make(names, *pipelines, root=data_root, **options):
        found = tuple(tasks.find(names.split(",")))
        options = {"device": "cpu", "timing": False, "batch_size": 8, "out": tmp_path / "out", **options}
        built = tuple(prunekit.load(one) for one in pipelines)
        return Plan(str(checkpoint), built, found, tasks.data_at(root), **options)

    return make


def go(plan):
    told = Quiet()
    return Runner(plan, told).run(), told


def by_name(outcome):
    return {(cell.task, cell.pipeline.name): cell for cell in outcome.cells}


def test_two_of_one_name_are_refused_wherever_they_come_from(plan, pipeline_file):
    """A table would show one as the older version of the other."""
    file = pipeline_file("fastv", {**FASTV["stages"][0], "keep": 0.5})
    with pytest.raises(InputError, match=r"two pipelines are called 'fastv': <dict> and .*fastv\.yaml"):
        plan("pope", FASTV, str(file))
    with pytest.raises(InputError, match="two pipelines are called 'inline': <dict> and <dict>"):
        plan("pope", {"stages": FASTV["stages"]}, {"stages": BLIND["stages"]})


def test_cells_hold_what_lmms_eval_found(plan):
    outcome, told = go(plan("pope,mme,mmbench_en_dev_static,scienceqa_img", DENSE, FASTV, timing=True))
    assert (outcome.computed, outcome.skipped, outcome.failed, told.cells) == (8, 0, (), 8)
    cells = by_name(outcome)
    pope = cells["pope", "dense"]
    assert pope.label == "micro/pope"
    assert {one.answer for one in pope.questions} == {"yes", "no"}
    assert len(pope.scores) == len(pope.groups) == 24
    assert pope.groups == cells["pope", "fastv"].groups
    assert sum(pope.scores.values()) / 24 == pytest.approx(pope.metrics["pope_accuracy,none"])
    assert 0 < pope.metrics["pope_accuracy,none"] < 1
    mme = cells["mme", "fastv"]
    assert set(mme.metrics) >= {"mme_perception_score,none"}
    assert len(set(mme.groups.values())) == 12  # two questions about each image
    mmbench = cells["mmbench_en_dev_static", "fastv"]
    assert mmbench.metrics["gpt_eval_score,none"] == pytest.approx(100 * sum(mmbench.scores.values()) / 24)
    assert sorted(cells["scienceqa_img", "fastv"].scores) == list(range(24))
    assert told.answered == 8 * 24


def test_cells_hold_what_was_saved(plan):
    outcome, _ = go(plan("pope", DENSE, FASTV, BLIND, timing=True, limit=8))
    dense, fastv, blind = (by_name(outcome)["pope", name] for name in ("dense", "fastv", "blind"))
    assert [cell.pipeline.dense for cell in (dense, fastv, blind)] == [True, False, False]
    assert (dense.saved.visual_tokens, dense.saved.kept_tokens) == (16, 16)
    assert (fastv.saved.visual_tokens, fastv.saved.kept_tokens, blind.saved.kept_tokens) == (16, 4, 0)
    assert (dense.saved.flops_fraction, dense.saved.kv_fraction) == (1, 1)
    assert 0 < blind.saved.flops_fraction < fastv.saved.flops_fraction < 1
    assert 0 < blind.saved.kv_fraction < fastv.saved.kv_fraction < 1
    assert dense.timing.prefill_ratio is None
    for cell in (fastv, blind):
        assert cell.timing.prefill_ratio == pytest.approx(cell.timing.prefill_ms / cell.timing.dense_prefill_ms, rel=1)
        assert cell.timing.prefill_batch == 8
    for cell in (dense, fastv, blind):
        assert cell.timing.seconds > 0
        assert (cell.timing.computed, cell.timing.journaled) == (8, 0)
        assert cell.conditions.batch_size == 8
        assert cell.conditions.versions["lmms-eval"].startswith("0.7")
        assert prunekit.load(cell.pipeline.resolved).sha == cell.pipeline.sha


def test_what_is_there_is_not_computed_again(plan, monkeypatch):
    first, _ = go(plan("pope", DENSE, FASTV, limit=6))
    monkeypatch.setattr(Runner, "loaded", property(lambda self: pytest.fail("the model was loaded")))
    again, told = go(plan("pope", DENSE, FASTV, limit=6))
    assert (again.computed, again.skipped, told.started) == (0, 2, [])
    assert again.cells == first.cells


def test_force_and_every_change_compute_again(plan):
    go(plan("pope", FASTV, limit=6))
    changed = {"name": "fastv", "stages": [{"use": "fastv", "at": 2, "keep": 0.5}]}
    assert go(plan("pope", FASTV, limit=6))[0].computed == 0
    assert go(plan("pope", FASTV, limit=6, force=True))[0].computed == 1
    assert go(plan("pope", changed, limit=6))[0].computed == 1
    assert go(plan("pope", FASTV, limit=8))[0].computed == 1
    assert go(plan("pope", FASTV, limit=6, batch_size=2))[0].computed == 1


def test_batch_1_equals_batch_8(plan):
    cells = [go(plan("pope,scienceqa_img", FASTV, batch_size=size))[0].cells for size in (1, 8)]
    assert [cell.questions for cell in cells[0]] == [cell.questions for cell in cells[1]]
    assert [cell.metrics for cell in cells[0]] == [cell.metrics for cell in cells[1]]


def test_one_failing_task_loses_nothing_else(plan, data_root, tmp_path, monkeypatch):
    root = tmp_path / "part"
    (root / "lmms-lab-encoder").mkdir(parents=True)
    for name in ("POPE", "ScienceQA"):
        (root / "lmms-lab-encoder" / name).symlink_to(data_root / "lmms-lab-encoder" / name)
    usual = harness.evaluate

    def evaluate(model, built, files):
        if (built.name, model.pipeline.name) == ("pope", "fastv"):
            raise RuntimeError("the metric broke")
        return usual(model, built, files)

    monkeypatch.setattr(runner.harness, "evaluate", evaluate)
    outcome, told = go(plan("mme,pope,scienceqa_img", DENSE, FASTV, root=root, limit=4))
    failed = {(cell.task, cell.pipeline.name): cell.error for cell in outcome.failed}
    assert set(failed) == {("mme", "dense"), ("mme", "fastv"), ("pope", "fastv")}
    assert "which is not there" in failed["mme", "dense"]
    assert failed["pope", "fastv"] == "RuntimeError: the metric broke"
    assert {key for key, cell in by_name(outcome).items() if cell.status == "done"} == {
        ("pope", "dense"), ("scienceqa_img", "dense"), ("scienceqa_img", "fastv"),
    }  # fmt: skip
    assert len(told.ended) == 6
    monkeypatch.undo()
    again, _ = go(plan("pope,scienceqa_img", DENSE, FASTV, root=root, limit=4))
    assert (again.computed, again.skipped, again.failed) == (1, 3, ())


def test_the_reason_is_not_hidden_by_retries():
    class Attempt:
        def exception(self):
            return AssertionError("MME only supports pairwise evaluation")

    error = RuntimeError("RetryError[<Future at 0x7f>]")
    error.last_attempt = Attempt()
    assert harness.reason(error) == "AssertionError: MME only supports pairwise evaluation"
    assert harness.reason(InputError("two\nlines")) == "two lines"


def test_questions_without_a_picture_run_dense_and_say_so(plan, tmp_path):
    import datasets
    from PIL import Image

    folder = tmp_path / "root" / "lmms-lab-encoder" / "ScienceQA" / "ScienceQA-FULL"
    folder.mkdir(parents=True)
    rows = [
        {"image": Image.new("RGB", (60, 60), (20 * n, 9, 9)) if n % 2 else None, "question": f"Which is {n}?",
         "choices": ["x", "y"], "answer": 0, "hint": ""}
        for n in range(6)
    ]  # fmt: skip
    shape = datasets.Features({
        "image": datasets.Image(), "question": datasets.Value("string"), "choices": [datasets.Value("string")],
        "answer": datasets.Value("int8"), "hint": datasets.Value("string"),
    })  # fmt: skip
    datasets.Dataset.from_list(rows, features=shape).to_parquet(folder / "test.parquet")
    (folder.parent / "README.md").write_text(
        "---\nconfigs:\n- config_name: ScienceQA-FULL\n"
        "  data_files:\n  - split: test\n    path: ScienceQA-FULL/*.parquet\n---\n"
    )
    with pytest.warns(PrunekitWarning, match="no visual tokens"):
        outcome, _ = go(plan("scienceqa", FASTV, root=tmp_path / "root", batch_size=4))
    cell = outcome.cells[0]
    assert cell.error == ""
    assert (cell.label, len(cell.scores)) == ("scienceqa", 6)
    assert cell.saved.visual_tokens == 8
    assert any("no visual tokens" in note for note in cell.notes)


def test_pipelines_that_do_not_fit_are_refused_before_the_model_is_loaded(plan, monkeypatch):
    monkeypatch.setattr(runner.Loaded, "load", lambda *args: pytest.fail("the model was loaded"))
    far = {"name": "far", "stages": [{"use": "fastv", "at": 77, "keep": 0.5}]}
    with pytest.raises(SpecError, match="no layer 77"):
        go(plan("pope", DENSE, far))


SLOWLY = """
import sys, time
from prunekit_evals.lmms import adapter
usual = adapter.answer
def slow(*given):
    time.sleep(0.3)
    return usual(*given)
adapter.answer = slow
from prunekit.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.timeout(600)  # two processes that import everything, on a machine that may be busy
def test_a_killed_run_goes_on_where_it_was(plan, checkpoint, data_root, pipeline_file, tmp_path):
    path = pipeline_file(FASTV["name"], *FASTV["stages"])
    command = [
        "eval", path, "--model", checkpoint, "--tasks", "pope", "--data-root", data_root, "--out", tmp_path / "out",
        "--no-dense", "--no-timing", "--batch-size", "2", "--device", "cpu", "--threads", "1",
    ]  # fmt: skip
    process = subprocess.Popen([sys.executable, "-c", SLOWLY, *map(str, command)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 400
    try:
        while (lines := sum(len(file.read_bytes().splitlines()) for file in tmp_path.rglob("*.journal.jsonl"))) < 6:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    outcome, _ = go(plan("pope", str(path), batch_size=2))
    timing = outcome.cells[0].timing
    assert timing.journaled >= lines
    assert timing.computed == 24 - timing.journaled
    assert not list(tmp_path.rglob("*.journal.jsonl"))
    whole, _ = go(plan("pope", str(path), batch_size=2, force=True))
    assert whole.cells[0].timing.computed == 24
    assert whole.cells[0].questions == outcome.cells[0].questions
    assert whole.cells[0].saved == outcome.cells[0].saved


def evaluate(checkpoint, data_root, model, **options):
    from lmms_eval.evaluator import simple_evaluate

    built = tasks.build(tasks.find(["pope"])[0], tasks.data_at(data_root), 6)
    return simple_evaluate(model=model, tasks=[built.task], task_manager=built.manager, limit=6, **options)


def test_the_response_cache_is_refused_where_it_would_be_stale(checkpoint, data_root, pipeline_file, tmp_path, capsys):
    import argparse

    path = pipeline_file("p", {"use": "dense"})
    options = {"model_args": f"pretrained={checkpoint},pipeline={path}", "use_cache": str(tmp_path / "cache")}
    with pytest.raises(InputError, match="journal="):
        evaluate(checkpoint, data_root, "prunekit", **options)
    cli = argparse.Namespace(output_path=str(tmp_path), process_with_media=False)
    with pytest.raises(SystemExit) as stopped:
        evaluate(checkpoint, data_root, "prunekit", cli_args=cli, **options)
    assert stopped.value.code == 2
    assert "stale answers" in capsys.readouterr().err


def test_the_response_cache_of_a_model_object_knows_its_pipeline(loaded, checkpoint, data_root, tmp_path):
    from prunekit_evals.lmms.adapter import PruneKitChat
    from prunekit_evals.lmms.requests import Settings

    def computed(pipeline):
        model = PruneKitChat.over(loaded, prunekit.load(pipeline), Settings(4))
        found = evaluate(checkpoint, data_root, model, use_cache=str(tmp_path / "cache"))
        assert found["results"]["pope"]["pope_accuracy,none"] >= 0
        return model.tally.computed

    assert computed(DENSE) == 6
    assert computed(DENSE) == 0
    assert computed(FASTV) == 6
    assert computed({**FASTV, "stages": [{"use": "fastv", "at": 2, "keep": 0.5}]}) == 6


@pytest.mark.timeout(600)
def test_lmms_eval_finds_the_model_by_itself(checkpoint, data_root, pipeline_file, tmp_path):
    path = pipeline_file("fastv", *FASTV["stages"])
    command = [
        sys.executable, "-m", "lmms_eval", "--model", "prunekit", "--tasks", "pope", "--batch_size", "4", "--device",
        "cpu", "--model_args", f"pretrained={checkpoint},pipeline={path}", "--output_path", str(tmp_path / "o"),
        "--log_samples", "--limit", "6",
    ]  # fmt: skip
    own = {**os.environ, "LMMS_EVAL_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=data_root, env=own, capture_output=True, text=True, timeout=550)
    assert "pope_accuracy" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads(next((tmp_path / "o").rglob("*_results.json")).read_text())
    assert found["throughput"]["avg_visual_tokens_kept"] == 4
    assert found["config"]["batch_size"] == "4" or found["config"]["batch_size"] == 4


def test_a_damaged_cell_is_computed_again(plan):
    outcome, _ = go(plan("pope", FASTV, limit=4))
    path = results.path_of(plan("pope", FASTV).out, outcome.cells[0])
    path.write_text(path.read_text()[:100])
    again, _ = go(plan("pope", FASTV, limit=4))
    assert again.computed == 1
    assert results.read(path).questions == outcome.cells[0].questions


def test_the_journal_is_no_place_for_other_pipelines(plan):
    first, _ = go(plan("pope", DENSE, limit=6))
    other, _ = go(plan("pope", BLIND, limit=6))
    assert (first.cells[0].timing.journaled, other.cells[0].timing.journaled) == (0, 0)


def test_costs_of_an_answer_are_those_of_its_row(loaded):
    report = type("Report", (), {})()
    report.samples, report.visual_tokens, report.kept_tokens, report.unsound = 4, (1, 1, 2, 2), (1, 1, 2, 2), (2,)
    report.cost = type("Cost", (), dict.fromkeys(("kv_bytes", "dense_kv_bytes", "prefill_flops"), (5, 5, 6, 6)))
    report.cost.dense_prefill_flops = (7, 7, 8, 8)
    report.cost.tower_flops, report.cost.dense_tower_flops = (3, 3, 1, 1), None
    assert [one.visual_tokens for one in answering.facts_of(report, 2)] == [1, 2]
    assert [(one.tower_flops, one.dense_tower_flops) for one in answering.facts_of(report, 2)] == [(3, None), (1, None)]
    assert answering.whole_fraction(answering.facts_of(report, 2)) is None
    report.cost.dense_tower_flops = (9, 9, 3, 3)
    assert answering.whole_fraction(answering.facts_of(report, 2)) == pytest.approx((5 + 6 + 3 + 1) / (7 + 8 + 9 + 3))
    assert [one.sound for one in answering.facts_of(report, 2)] == [True, False]
    assert answering.facts_of(None, 2) == [None, None]


def test_cells_count_what_the_model_did_not_compute_finitely(plan, tmp_path):
    """Of dense and pruned rows alike; a second run, whose answers come from the cells, says the same."""
    planned = plan("pope", DENSE, FASTV, limit=5)
    made = Runner(planned, Quiet())
    with torch.no_grad():
        made.loaded.model.lm_head.weight[7] = float("inf")
    cells = by_name(made.run())
    for name in ("dense", "fastv"):
        cell = cells["pope", name]
        assert cell.status == "done" and cell.unsound == 5
        assert any(note.startswith("logits, samples 0, 1, 2, 3, 4: ") for note in cell.notes)
        assert results.read(results.path_of(planned.out, cell)) == cell
    (table,) = tables.of_cells(cells.values())
    assert "fastv on micro/pope: the model computed NaN or infinity for 5 questions" in table.notes
    sound = plan("pope", FASTV, limit=5, out=tmp_path / "sound")
    assert by_name(go(sound)[0])["pope", "fastv"].unsound == 0


def test_a_journal_remembers_which_answers_were_unsound(tmp_path):
    answers = [Answer("yes", 3, 1, Facts(16, 4, 10, 20, 3, 6, sound=sound)) for sound in (True, False)]
    with Journal(tmp_path / "j") as journal:
        journal.add(zip("ab", answers, strict=True))
    tally = Tally()
    tally.add([Journal(tmp_path / "j").get(key) for key in "ab"], journaled=True)
    assert tally.unsound == 1 and answering.means(tally.facts)["unsound_questions"] == 1


def test_likelihoods_that_are_not_finite_are_counted(loaded):
    prompt, tally = Prompt("USER: <image>\nIs it? ASSISTANT:", (Image.new("RGB", (64, 64)),)), Tally()
    likelihoods.losses(loaded, prunekit.load(FASTV), prompt, [" yes"], 1, tally)
    assert tally.unsound == 0
    head = loaded.model.lm_head.forward
    loaded.model.lm_head.forward = lambda states: head(states) * float("nan")
    try:
        likelihoods.losses(loaded, prunekit.load(FASTV), prompt, [" yes"], 1, tally)
    finally:
        del loaded.model.lm_head.forward
    assert tally.unsound == 1 and any(note.startswith("logits, samples 0: ") for note in tally.notes)
