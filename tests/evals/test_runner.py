"""Whole runs over lmms-eval's own tasks: cells, skipping, failures, kills, caches."""

import dataclasses
import fcntl
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
from prunekit_evals.run import answering, files, likelihoods, reading, results, unanswered
from prunekit_evals.run.answering import Tally
from prunekit_evals.run.journal import Answer, Facts, Journal
from prunekit_evals.run.prompts import Prompt
from prunekit_evals.runner import Plan, Runner

import prunekit
from prunekit.errors import InputError, PrunekitWarning, SpecError
from prunekit.strategy.decisions import LayerPlan

DENSE = {"name": "dense", "stages": [{"use": "dense"}]}
FASTV = {"name": "fastv", "stages": [{"use": "fastv", "at": 2, "keep": 0.25}]}
RANDOM = {"name": "drawn", "stages": [{"use": "random", "keep": 0.25, "seed": 7}]}
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
    planned = plan("pope", DENSE, FASTV, BLIND, timing=True, limit=8)
    outcome, cell_folder = go(planned)[0], planned.out
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
        assert results.read(results.path_of(cell_folder, cell)) == cell
    whole = dense.executed.layer_tokens[0]
    assert dense.executed.layer_tokens == (whole,) * 4
    assert fastv.executed.layer_tokens == (whole, whole, whole - 12, whole - 12)
    assert blind.executed.layer_tokens == (whole - 16,) * 4
    for cell in (dense, fastv, blind):  # nothing here decides by itself: what budgets say is what was done
        assert cell.executed.layer_tokens == cell.foretold.layer_tokens
        assert cell.foretold.flops == (cell.saved.prefill_flops,) * 2
        assert (cell.executed.layers_run, cell.executed.off_budget, cell.empty) == (4, 0, 0)


def test_cells_hold_what_was_asked_and_with_which_seeds(plan):
    outcome, _ = go(plan("pope,gqa", RANDOM, limit=3))
    pope, gqa = (by_name(outcome)[task, "drawn"] for task in ("pope", "gqa"))
    assert pope.pipeline.seeds == (7,)
    for one in (*pope.questions, *gqa.questions):
        assert one.text.startswith(("Is ", "What ", "Which ", "Where ")) and one.target and one.document, one
    assert {one.target for one in pope.questions} <= {"Yes", "No", "yes", "no"}
    assert len({one.document for one in pope.questions}) == 3


def test_a_stage_that_leaves_another_number_than_asked_is_counted_and_named(plan, monkeypatch):
    usual = answering.decoder_facts

    def short(report, sample):
        return {**usual(report, sample), "missed": [("fastv at 2", 4, 3 + sample % 2)] if sample % 2 == 0 else []}

    monkeypatch.setattr(answering, "decoder_facts", short)
    (cell,) = go(plan("pope", FASTV, limit=5))[0].cells
    assert cell.executed.off_budget == 3
    assert cell.notes == ("fastv at 2 kept 3 visual tokens where its budget asked for 4, for 3 questions",)


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


def test_own_tasks_with_a_damaged_image_are_whole_but_for_one_question(plan, own_tasks, tmp_path):
    image = own_tasks / "2.png"
    image.write_bytes(image.read_bytes()[:-40])
    planned = plan("pope", DENSE, limit=4)
    planned = dataclasses.replace(planned, tasks=tuple(tasks.find(["pope", "mine"], own_tasks)))
    outcome, told = go(planned)
    pope, mine = (by_name(outcome)[task, "dense"] for task in ("pope", "mine"))
    assert (pope.label, mine.label, told.answered) == ("micro/pope", "mine", 8)
    assert pope.conditions.data == planned.data.identity and mine.conditions.data.startswith("own-")
    assert mine.status == "done" and list(mine.unanswered) == [2] and "truncated" in mine.unanswered[2]
    broken = mine.questions[2]
    assert (broken.answer, broken.score, broken.document, broken.target) == ("", 0.0, "q2", "yes")
    assert [one.document for one in mine.questions] == ["q0", "q1", "q2", "q3"] and mine.empty == 0
    notes = [note for table in tables.of_cells(outcome.cells) for note in table.notes]
    assert any(note.startswith("dense on mine: 1 question could not be answered, counted as wrong: ") for note in notes)
    strict, _ = go(dataclasses.replace(planned, unanswered="fail"))
    (failed,) = strict.failed
    assert failed.error.startswith("1 of 4 questions could not be answered: document 2: ")
    again, _ = go(planned)
    assert again.failed == () and by_name(again)["mine", "dense"].timing.journaled == 3


LIKELY = ("generate_until\n", "multiple_choice\ndoc_to_choice: ['no', 'yes']\n")
ROUNDS = (
    "generate_until\n",
    "generate_until_multi_round\ndoc_to_messages: !function utils.messages\nprocess_results: !function utils.judged\n",
)
MESSAGES = """
def messages(doc, round_idx=None, previous_output=None, previous_round_info=None):
    if round_idx == 2:
        return None, True, previous_output, None
    shown = [{"type": "image", "url": image} for image in images({**doc, "file": "lost.png"} if (
        round_idx and doc["id"] == "q1") else doc)]
    asked = [{"role": "user", "content": [*shown, {"type": "text", "text": doc["question"]}]}]
    return asked if round_idx is None else (asked, False, previous_output, None)
def judged(doc, results):
    return {"exact_match": float(results[0][-1].strip().lower() == doc["answer"])}
"""


@pytest.mark.parametrize("kind", [LIKELY, ROUNDS], ids=["likelihoods", "rounds"])
def test_a_lost_question_costs_nothing_but_itself_whatever_kind_of_task_it_is_of(plan, own_tasks, kind):
    """The image of question 2 is damaged; of q1's two rounds the second shows one that is not there."""
    image = own_tasks / "2.png"
    image.write_bytes(image.read_bytes()[:-40])
    file = own_tasks / "mine.yaml"
    file.write_text(file.read_text().replace(*kind))
    (own_tasks / "utils.py").write_text((own_tasks / "utils.py").read_text() + MESSAGES)
    planned = dataclasses.replace(plan("pope", DENSE, FASTV), tasks=tuple(tasks.find(["mine"], own_tasks)))
    outcome, told = go(planned)
    lost = {2} if kind is LIKELY else {1, 2}
    for cell in outcome.cells:
        assert (cell.status, set(cell.unanswered)) == ("done", lost), cell.error
        assert "truncated" in cell.unanswered[2] and (kind is LIKELY or "lost.png" in cell.unanswered[1])
        assert all((one.answer == "" and one.score == 0.0) == (one.number in lost) for one in cell.questions)
        assert cell.executed is not None and cell.empty == 0
    assert told.answered == 8
    strict, _ = go(dataclasses.replace(planned, unanswered="fail"))
    assert [cell.error.partition(": ")[0] for cell in strict.failed] == [
        f"{len(lost)} of 4 questions could not be answered"
    ] * 2


def test_a_cell_without_any_answer_fails(plan, own_tasks):
    for image in own_tasks.glob("*.png"):
        image.write_bytes(b"")
    outcome, _ = go(dataclasses.replace(plan("pope", DENSE), tasks=tuple(tasks.find(["mine"], own_tasks))))
    assert outcome.failed[0].error.startswith("no question could be answered: document 0: ")
    assert outcome.failed[0].error.endswith("; and 1 more")


def test_random_subsets_name_questions_as_the_data_does(plan):
    planned = plan("pope", DENSE, limit=5)
    first = go(planned)[0].cells[0]
    drawn = go(dataclasses.replace(planned, subset_seed=3))[0].cells[0]
    whole = {one.number: one for one in go(dataclasses.replace(planned, limit=None))[0].cells[0].questions}
    assert [one.number for one in drawn.questions] != [one.number for one in first.questions] == [0, 1, 2, 3, 4]
    assert len(drawn.questions) == 5 and all(one == whole[one.number] for one in drawn.questions)
    assert drawn.conditions.subset_seed == 3 and drawn.id != first.id
    assert "5 questions a task drawn with seed 3" in drawn.conditions.title()


def test_a_full_disk_ends_the_run_and_what_is_saved_goes_on(plan, monkeypatch):
    planned = plan("pope,gqa", DENSE, limit=4)
    usual, writes = files.os.fsync, []

    def fsync(handle):
        writes.append(handle)
        if len(writes) > 2:  # one batch of answers and one cell
            raise OSError(28, "No space left on device")
        usual(handle)

    monkeypatch.setattr(files.os, "fsync", fsync)
    with pytest.raises(files.CannotWrite, match="cannot be written: No space left on device"):
        go(planned)
    monkeypatch.undo()
    again, _ = go(planned)
    assert (again.computed, again.skipped, again.failed) == (1, 1, ())


def test_the_reason_is_not_hidden_by_retries():
    class Attempt:
        def exception(self):
            return AssertionError("MME only supports pairwise evaluation")

    error = RuntimeError("RetryError[<Future at 0x7f>]")
    error.last_attempt = Attempt()
    assert unanswered.reason(error) == "AssertionError: MME only supports pairwise evaluation"
    assert unanswered.reason(InputError("two\nlines")) == "two lines"


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
    report.prompt_tokens, report.layer_tokens, report.plans = (9,) * 4, ((9, 5),) * 4, (LayerPlan(),) * 4
    report.events = ()
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


def test_a_cell_that_another_process_computes_is_left_to_it(plan):
    planned = plan("pope", DENSE, FASTV, limit=4)
    ours = Runner(planned, Quiet())
    named, (dense, fastv) = planned.tasks[0], planned.pipelines
    path = ours.path("pope", dense)
    path.parent.mkdir(parents=True)
    with path.with_suffix(".lock").open("w") as file:  # lmms-eval makes every FileLock of a process one
        fcntl.flock(file, fcntl.LOCK_EX)
        assert ours.cell(named, dense) is None
        assert ours.cell(named, fastv).status == "done"
    assert ours.cell(named, dense).status == "done"  # its holder is gone, and had not written it
    assert not list(planned.out.rglob("*.lock"))


def test_what_another_process_wrote_meanwhile_is_not_computed_again(plan):
    """A result that it forced, or a failure: both are as new as any."""
    go(plan("pope", DENSE, limit=4))
    for force, status in ((True, "done"), (False, "failed")):
        ours = Runner(plan("pope", DENSE, limit=4, force=force), Quiet())
        named, (dense,) = ours.plan.tasks[0], ours.plan.pipelines
        path = ours.path("pope", dense)
        old = results.read(path)
        if not force:
            results.write(path, dataclasses.replace(old, status="failed"))
        assert ours._there(named, dense) is None
        again = dataclasses.replace(old, status=status, created="2001-01-01T00:00:00+00:00")
        results.write(path, again)
        outcome = ours.run()
        assert (outcome.computed, outcome.skipped, outcome.cells) == (0, 1, (again,))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_on_one_folder_share_the_work(plan, checkpoint, data_root, pipeline_file, tmp_path):
    """Each cell is written once, by one of them; both end with the whole table."""
    files = [pipeline_file(f"p{keep}", {"use": "fastv", "at": 2, "keep": keep / 16}) for keep in (4, 8, 12)]
    command = [
        "eval", *files, "--model", checkpoint, "--tasks", "pope,mme", "--data-root", data_root, "--out",
        tmp_path / "out", "--no-timing", "--batch-size", "4", "--device", "cpu", "--threads", "1", "--json", "--limit",
        "8",
    ]  # fmt: skip
    run = [sys.executable, "-c", SLOWLY, *map(str, command)]
    both = [subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=500) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    told = [json.loads(out) for out, _ in said]
    assert sum(one["computed"] for one in told) == 8 and all(one["computed"] for one in told)
    assert [one["computed"] + one["there_before"] for one in told] == [8, 8]
    cells = reading.read([tmp_path / "out"]).cells
    assert len(cells) == 8 and {cell.timing.computed for cell in cells} == {8}
    assert not [path for suffix in ("lock", "journal.jsonl") for path in (tmp_path / "out").rglob(f"*.{suffix}")]
