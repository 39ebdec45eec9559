"""The study's text says what its figures say, and docs/par.md holds it."""

import json
import random
import sys
from pathlib import Path

import pytest

pytest.importorskip("lmms_eval")
ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))

from prunekit_evals.run.stamp import TASKS
from prunekit_evals.studies.par import __main__ as command
from prunekit_evals.studies.par import findings, page, results, tables
from prunekit_evals.studies.par.cells import Row
from prunekit_evals.studies.par.settings import PAGE, PIPELINE, RESULTS, VARIANTS, settings_for

SETTING = "50 % of FLOPs, L=8"
QUESTIONS = 100
MARKED = "before\n\n<!-- study -->\nold\n<!-- /study -->\n\nafter\n"


def row(share, flops=0.49, seed=0, tasks=None, stages="[{use: x}]"):
    """Answers of which about `share` are right, or as `tasks` has it for some tasks."""
    drawn = random.Random(seed)
    shares = dict.fromkeys(TASKS, share) | (tasks or {})
    right = {task: [drawn.random() < shares[task] for _ in range(QUESTIONS)] for task in TASKS}
    return Row(stages, right, flops, 0.5, 40.0, 0.03).as_data()


def table(par, **rivals):
    base = {"dense": row(0.97, 1.0), "blind": row(0.3, 0.1, 5)}
    rows = {"PAR": row(**par, stages="[{use: par, at: [1, 4], keep_tokens: [68, 32]}]"), **rivals}
    return {
        "orders": {"skip_layers": [6, 4], "freeze_layers": [4]}, "text_tokens": 25, "sites": [1, 4],
        "costs": {SETTING: 0.49}, "base": base, "settings": {SETTING: rows},
    }  # fmt: skip


def test_a_target_that_is_reached_and_one_that_is_missed_are_called_so():
    good = findings.targets(table({"share": 0.97}, **{"fastv, before layer 2": row(0.7, seed=1)}))
    assert "is **reached**" in good and "missed" not in good
    assert "above zero on 6 (pope, mme, gqa, mmbench, scienceqa, textvqa) of 6: above zero on most tasks" in good
    bad = findings.targets(table({"share": 0.7, "seed": 1}, **{"fastv, before layer 2": row(0.97, seed=2)}))
    assert "is **missed**" in bad and "below zero on 6" in bad and "**not** on most tasks" in bad
    mixed = {"pope": 0.4, "gqa": 0.4}
    rival = {"random, at the encoder": row(0.9, seed=1, tasks=mixed)}
    some = findings.targets(table({"share": 0.9, "seed": 1}, **rival))
    assert "above zero on 2 (pope, gqa)" in some and "not clear of zero on 4" in some and "**not** on most" in some
    dear = findings.targets(table({"share": 0.97, "flops": 0.51}))
    assert dear == "No setting is within 50% of dense FLOPs."


def test_rivals_that_are_better_are_named():
    found = table({"share": 0.8, "seed": 3}, best=row(0.97, seed=4), like=row(0.8, seed=3), worse=row(0.5, seed=6))
    told = findings.ranking(found)
    assert "1 of 3 rivals are better, 1 worse, 1 cannot be told apart" in told
    assert "Better: best by +" in told and "Not told apart: like." in told
    lines = tables.accuracy(found, SETTING).splitlines()
    names = [line.split(" | ")[0].strip("| ") for line in lines[2:]]
    assert names == ["dense", "best", *sorted(["**PAR**", "like"], key=names.index), "worse", "blind"]
    assert tables.kept(found, SETTING) == "68, then 32"


def test_layers_and_tokens_are_set_against_tokens_alone_at_equal_flops():
    found = table({"share": 0.9, "seed": 1})
    found["settings"]["50 % of FLOPs, L=7"] = {"PAR": row(0.5, seed=2)}
    found["settings"]["60 % of FLOPs, L=7"] = {"PAR": row(0.5, seed=2)}
    told = findings.joint(found)
    assert told.startswith("- PAR at 50 % of FLOPs, tokens and layers (L=7) minus tokens alone (L=8): -")
    assert told.endswith("below zero.") and "60 %" not in told


def test_the_layer_finding_names_what_the_cosine_gets_wrong():
    rows = {"dense": row(0.97), "0-1": row(0.1, seed=1), "1-2": row(0.97), "2-3": row(0.5, seed=2)}
    told = findings.layers({"rows": rows, "cosines": [0.2, 0.5, 0.9]})
    assert "Pairs whose loss is not clear of zero: 1-2." in told
    assert "The cheapest pair is 1-2" in told and "the one with the highest cosine is 2-3 (-4" in told
    assert "0.50." in told


def test_boxes_are_quartiles_over_draws_and_the_best_draw_is_a_bound():
    rows = {"dense": row(0.97), "0.1 attention": row(0.6, seed=1)}
    rows |= {f"0.1 {kind} {n}": row(0.5 + 0.02 * n, seed=10 * n) for kind in ("random", "noise") for n in range(8)}
    found = {"rows": rows}
    low, _, middle, _, high = tables.five(tables.boxes_of(found)["0.1", "noise"])
    assert low < middle < high < tables.any_of(found, "0.1", "noise") <= 1
    assert tables.five([0.5]) == [0.5] * 5
    assert "10% | attention + noise | 8" in tables.boxes(found)
    assert f"{100 * (high - low):.1f} points" in findings.boxes(found)


def test_the_layer_that_does_least_is_counted_question_by_question():
    whole = [[0.1, 0.2, 0.9, 0.5]] * 4
    half = [[0.1, 0.2, 0.9, 0.5], *[[0.1, 0.2, 0.3, 0.5]] * 3]
    found = {"from": 2, "cosines": {"all": whole, "attention": half, "noise 0": half, "noise 1": whole}}
    told = findings.correlation(found)
    assert "50 % by attention it is another one for 75% of" in told and "noise it is another one for 38% of" in told
    assert "| … the least active one | 25% | 75% |" in tables.correlation(found)


def test_ablations_say_what_is_worse_and_what_was_not_trained():
    rows = {"shipped": row(0.9, seed=1), "plain": row(0.9, seed=1), "causal": row(0.5, seed=2)}
    training = {name: {"steps": 60, "start": 0.2, "random": 0.1, "end": 0.02, "difference": 30.0} for name in rows}
    found = {"settings": {SETTING: rows}, "training": training}
    assert "against the plain router: worse: causal; not told apart: shipped." in findings.ablations(found)
    assert "Another seed" not in findings.ablations(found)
    rows["plain-1"] = row(0.5, seed=2)
    assert "Another seed of plain differs from it by -4" in findings.ablations(found)
    del rows["plain"], rows["plain-1"]
    assert "against the shipped router: worse: causal." in findings.ablations(found)
    text = tables.ablations({"rows": rows, "training": training}, {one.folder: one.about for one in VARIANTS})
    assert "`dpo`: DPO's loss | not trained" in text and "0.200 / 0.100 / 0.020" in text


def about(**changes):
    router = {"options": {"at": [1, 4]}, "trained": False}
    told = {**results.now(), "questions": QUESTIONS, "dtype": "float32", "router": router}
    return {"about": {**told, "versions": {"torch": "2", "transformers": "5"}, **changes}}


def test_figures_of_another_model_are_called_stale():
    fresh = page.written(about(), results.now())
    assert "Stale" not in fresh and "**untrained**" in fresh and "Not measured." in fresh
    stale = page.written(about(model="other"), results.now())
    assert "**Stale**: the model changed since; run `make study`." in stale
    assert page.written({}, results.now()) == "Not measured yet: `make study`."


def test_later_questions_are_a_part_of_their_own():
    rows = {"dense": row(0.97, 1.0), "PAR": row(0.97), "fastv, before layer 2": row(0.6, seed=1)}
    text = page.written(about() | {"unseen": {"setting": SETTING, "first": 200, "rows": rows}}, results.now())
    assert f"### {SETTING}, on later questions" in text and "They begin with number 200 of each task." in text
    assert "is **reached**" in text and "above zero on 6" in text


def test_only_the_marked_part_is_written():
    text = page.into(MARKED, {}, {})
    assert text.startswith("before\n\n<!-- study -->\n\nNot measured yet")
    assert text.endswith("<!-- /study -->\n\nafter\n")
    assert page.into(text, {}, {}) == text
    with pytest.raises(ValueError, match="<!-- study -->"):
        page.into("no markers", {}, {})


def test_render_measures_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "measured", None)
    target, found = tmp_path / "page.md", tmp_path / "results.json"
    target.write_text(MARKED)
    results.save(found, about() | {"table": table({"share": 0.9})})
    assert json.loads(found.read_text()) == results.load(found)
    assert command.main(["--render", "--page", str(target), "--results", str(found)]) == 0
    assert f"#### {SETTING}, T=68, then 32" in target.read_text()
    for wrong in (["--only", "nothing"], ["--questions", "3"]):
        with pytest.raises(SystemExit):
            command.main(wrong)
    assert "no part nothing" in capsys.readouterr().err
    with pytest.raises(SystemExit):  # before anything is measured
        command.main(["--page", str(tmp_path / "none.md")])
    assert "is no page with '<!-- study -->'" in capsys.readouterr().err


def test_the_router_is_the_one_that_the_pipeline_file_names(tmp_path):
    stage = command.router_stage(PIPELINE, None)
    assert stage["use"] == "par" and not set(stage) & set(command.BUDGETS)
    other = command.router_stage(PIPELINE, "some/folder")
    assert other["weights"] == "some/folder" and set(other) <= {"use", "at", "eligible", "protect", "weights"}
    two = tmp_path / "two.yaml"
    two.write_text("name: two\nstages: [{use: fastv, keep: 0.5}]\n")
    with pytest.raises(ValueError, match="has not one stage with a router"):
        command.router_stage(two, None)
    assert [one.layers for one in settings_for(32)] == [32, 32, 31, 32]


def test_the_page_holds_what_was_measured():
    """Where the model changed since, `make study STUDY_ARGS=--render` marks the figures as stale."""
    text = PAGE.read_text(encoding="utf-8")
    assert page.into(text, results.load(RESULTS), results.now()) == text
