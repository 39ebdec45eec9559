"""The comparison: which cells stand in one table, in which order, and with which numbers."""

import dataclasses
import io
import json

import pytest
from prunekit_evals.compare import rendering, stats, tables
from prunekit_evals.run import results
from prunekit_evals.run.results import Cell, Conditions, PipelineId, Question, Saved, Timing
from rich.console import Console

from prunekit.errors import InputError

CONDITIONS = Conditions(
    model="micro", identity="abc", data="d1", limit=100, batch_size=8, dtype="float32", device="cpu",
    attention="default", max_new_tokens=1024, system_prompt="", honor_until="stops", prompt_profile="",
    versions={"prunekit": "0.1.0"},
)  # fmt: skip


def cell(name, task, hits, *, flops=1.0, created="1", sha=None, conditions=CONDITIONS, status="done", count=100):
    pipeline = PipelineId(name, sha or name, name == "dense", f"name: {name}\n", "code")
    questions = tuple(Question(number, "yes", float(number < hits)) for number in range(count))
    return Cell(
        id=results.cell_id(conditions, pipeline, task), status=status, task=task, label=f"micro/{task}",
        pipeline=pipeline, conditions=conditions, created=created, error="broke" if status == "failed" else "",
        questions=questions if status == "done" else (), metrics={"x,none": hits / count},
        saved=Saved(144, 144 * flops, 1, 1, flops, 1, 1, flops) if status == "done" else None,
        timing=Timing(0.1, count, 0, 5.0, 10.0, flops, 8, 5) if status == "done" else None,
    )  # fmt: skip


def shown(one, width=120):
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    rendering.show(one, console)
    return console.file.getvalue()


def test_rows_stand_by_cost_under_the_dense_one():
    cells = [cell("cheap", "pope", 70, flops=0.2), cell("dear", "pope", 80, flops=0.6), cell("dense", "pope", 90)]
    cells += [cell("better", "pope", 75, flops=0.2)]
    (only,) = tables.of_cells(cells)
    assert [row.pipeline for row in only.rows] == ["dense", "dear", "better", "cheap"]


def test_numbers_of_a_row():
    cells = [cell("dense", "pope", 90), cell("p", "pope", 80, flops=0.5)]
    cells += [cell("dense", "gqa", 60), cell("p", "gqa", 60, flops=0.3)]
    (only,) = tables.of_cells(cells)
    dense, ours = only.rows
    assert dense.difference is None
    assert (dense.average.value, ours.average.value) == (pytest.approx(0.75), pytest.approx(0.7))
    wilson = stats.wilson([1.0] * 80 + [0.0] * 20)
    assert (ours.tasks["micro/pope"].value, ours.tasks["micro/pope"].n) == (0.8, 100)
    assert (ours.tasks["micro/pope"].low, ours.tasks["micro/pope"].high) == pytest.approx(
        (wilson.low, wilson.high), abs=0.01
    )
    assert ours.difference.value == pytest.approx(-0.05)
    assert ours.difference.low < -0.05 < ours.difference.high < 0
    assert ours.flops_fraction == ours.kv_fraction == ours.prefill_ratio == pytest.approx(0.4)
    assert (ours.visual_tokens, ours.kept_tokens) == (144, pytest.approx(57.6))


def test_averages_are_over_what_all_have():
    cells = [cell("dense", "pope", 90), cell("dense", "gqa", 50), cell("p", "pope", 80)]
    (only,) = tables.of_cells(cells)
    assert only.shared == ("micro/pope",)
    assert only.rows[0].average.value == pytest.approx(0.9)
    assert any("averages are over micro/pope" in note for note in only.notes)
    assert "–" in shown(only)


def test_what_was_measured_differently_stands_apart():
    other = dataclasses.replace(CONDITIONS, batch_size=1)
    cells = [cell("dense", "pope", 90, created="2"), cell("dense", "pope", 80, conditions=other, created="1")]
    assert [one.conditions.batch_size for one in tables.of_cells(cells)] == [1, 8]


def test_an_edited_pipeline_replaces_its_older_self():
    cells = [cell("p", "pope", 10, sha="old", created="1"), cell("p", "pope", 80, sha="new", created="2")]
    (only,) = tables.of_cells(cells)
    assert [(row.sha, row.tasks["micro/pope"].value) for row in only.rows] == [("new", 0.8)]
    assert any("older" in note for note in only.notes)


def test_failures_and_a_missing_dense_row_are_said():
    (only,) = tables.of_cells([cell("p", "pope", 80), cell("p", "gqa", 0, status="failed")])
    assert any("p on micro/gqa failed: broke" in note for note in only.notes)
    assert any("no dense row" in note for note in only.notes)
    assert only.verdicts == ()
    assert only.rows[0].difference is None


@pytest.mark.parametrize("width", [60, 80, 100, 120, 200])
def test_the_table_fits_and_breaks_no_number(width):
    tasks = ("pope", "mme", "gqa", "mmbench_en_dev_static", "scienceqa_img")
    cells = [cell(name, task, hits, flops=flops) for task in tasks for name, hits, flops in
             (("dense", 93, 1.0), ("fastv-k2-r25", 81, 0.35), ("divprune-r11", 100, 0.2))]  # fmt: skip
    (only,) = tables.of_cells(cells)
    text = shown(only, width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text.partition("micro/…:")[0]
    assert "−12.0" in text and "micro/…: the bundled benchmark" in " ".join(text.split())
    if width >= 120:
        assert "81.0 ±" in text and "micro/" in text and "35%" in text


def test_a_column_that_says_nothing_is_left_out():
    untimed = dataclasses.replace(cell("dense", "pope", 90), timing=Timing(0.1, 100, 0))
    (only,) = tables.of_cells([untimed])
    assert "Time" not in rendering.columns(only)
    assert "Δ dense" not in rendering.columns(only)
    assert "90.0" in shown(only)


def test_markdown_has_every_number():
    cells = [cell("dense", "pope", 90), cell("p|q", "pope", 80, flops=0.5)]
    (only,) = tables.of_cells(cells)
    text = rendering.markdown(only)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert rows[0] == "| Pipeline | micro/pope | Average | Δ dense | Tokens | FLOPs | KV | Time |"
    assert rows[3].startswith("| p\\|q | 80.0 ±")
    assert "−10.0 ±" in rows[3] and rows[3].endswith("| 72 | 50% | 50% | 0.50× |")
    assert len({line.replace("\\|", "").count("|") for line in rows}) == 1


def test_the_whole_prefill_stands_beside_the_decoders():
    """Where it is known; it goes first where there is no room."""
    known = dataclasses.replace(cell("p", "pope", 80, flops=0.5), saved=Saved(144, 72, 1, 1, 0.5, 1, 1, 0.5, 0.625))
    (only,) = tables.of_cells([cell("dense", "pope", 90), known])
    assert rendering.columns(only)["Whole"] == ["", "62%"]
    assert "| FLOPs | Whole | KV |" in rendering.markdown(only) and only.rows[1].whole_flops_fraction == 0.625
    full = shown(only)
    assert "Whole" in full and "KV" in full
    narrow = shown(only, max(map(len, full.splitlines()[:8])) - 3)
    head = next(line for line in narrow.splitlines() if "Pipeline" in line)
    assert "Whole" not in head and "KV" in head
    assert "hidden, for lack of width: Whole (--markdown has all)" in narrow and "hidden" not in full
    assert "Δ dense" in shown(only, 60) and "intervals" not in shown(only, 60)  # no tasks, so no intervals of tasks


def test_times_of_two_machines_stand_in_two_columns():
    """And which is which is said; no ratio is a mean of both."""
    here, there = (dataclasses.replace(Timing(0.1, 100, 0, 5.0, 10.0, 0.5, 8, 5), machine=name) for name in "AB")
    slow = dataclasses.replace(there, prefill_ratio=0.9)
    ours = cell("p", "pope", 80, flops=0.5), cell("p", "gqa", 80, flops=0.5)
    both = [dataclasses.replace(one, timing=timing) for one, timing in zip(ours, (here, slow), strict=True)]
    dense = [cell("dense", task, 90) for task in ("pope", "gqa")]
    untimed = [dataclasses.replace(one, timing=Timing(0.1, 100, 0)) for one in dense]
    (only,) = tables.of_cells([*untimed, *both, dataclasses.replace(cell("q", "pope", 80, flops=0.4), timing=there)])
    found = rendering.columns(only)
    assert (found["Time 1"], found["Time 2"]) == (["1×", "0.50×", ""], ["1×", "0.90×", "0.50×"])
    assert "Time" not in found and [row.prefill_ratio for row in only.rows] == [None] * 3
    assert "times of different machines are not comparable: Time 1 on A; Time 2 on B" in only.notes


def test_a_difference_of_nothing_has_no_sign():
    (only,) = tables.of_cells([cell("dense", "pope", 90), cell("p", "pope", 90, flops=0.5)])
    assert rendering.columns(only)["Δ dense"][1].startswith("0.0 ±")


def test_from_a_folder(tmp_path):
    with pytest.raises(InputError, match="no results folder"):
        tables.tables(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no results under"):
        tables.tables(tmp_path)
    for one in (cell("dense", "pope", 90), cell("p", "pope", 80)):
        results.write(results.path_of(tmp_path, one), one)
    (tmp_path / "pope.0123456789.json").write_text("{")
    (only,), (skipped,) = tables.tables(tmp_path)
    assert str(skipped).startswith(f"{tmp_path}/pope.0123456789.json: not a result")
    data = json.loads(json.dumps(only.to_json()))
    assert [row["pipeline"] for row in data["rows"]] == ["dense", "p"]
    assert data["rows"][1]["tasks"]["micro/pope"]["value"] == 0.8


def test_a_failure_is_shown_only_while_no_newer_result_of_that_cell_exists():
    under = [dataclasses.replace(CONDITIONS, versions={"prunekit": version}) for version in ("0.1.0", "0.2.0")]
    failed = cell("p", "pope", 0, status="failed", created="2", conditions=under[0])
    assert any("p on micro/pope failed: broke" in note for one in tables.of_cells([failed]) for note in one.notes)
    for other in (
        cell("p", "gqa", 80, created="3"), cell("q", "pope", 80, created="3"), cell("p", "pope", 80, created="1"),
        cell("p", "pope", 80, created="3", conditions=dataclasses.replace(CONDITIONS, batch_size=1)),
    ):  # fmt: skip
        made = tables.of_cells([failed, other])
        assert any("failed" in note for one in made for note in one.notes), other
    for newer in under:
        made = tables.of_cells([failed, cell("p", "pope", 80, created="3", conditions=newer)])
        assert [len(one.rows) for one in made] == [1]
        assert not any("failed" in note for one in made for note in one.notes)


def test_results_of_a_bundled_model_that_was_replaced_are_marked_stale(tmp_path):
    from prunekit_evals.micro import model_path

    from prunekit.loading import model_identity

    now = dataclasses.replace(CONDITIONS, identity=model_identity(model_path()))
    other = dataclasses.replace(CONDITIONS, model="org/model")
    for created, conditions in enumerate((CONDITIONS, now, other)):
        one = cell("dense", "pope", 90, created=str(created), conditions=conditions)
        results.write(results.path_of(tmp_path, one), one)
    found, _ = tables.tables(tmp_path)
    stale = [any(note.startswith("stale: micro was abc and is ") for note in one.notes) for one in found]
    assert stale == [True, False, False]


def pruning(name, hits, *, use="random", seed=0, group=None, **rest):
    """A cell of a pipeline with a seed; hits: how many questions are right, from the first on."""
    one = cell(name, "pope", hits, sha=f"{name}{use}{seed}", flops=rest.pop("flops", 0.2), **rest)
    resolved = f"name: {name}\nstages:\n- use: {use}\n  at: encoder\n  keep: 0.1\n  seed: {seed}\n"
    questions = tuple(dataclasses.replace(each, group=group and group(each.number)) for each in one.questions)
    return dataclasses.replace(one, pipeline=dataclasses.replace(one.pipeline, resolved=resolved), questions=questions)


def test_seeds_of_a_pipeline_are_one_row():
    cells = [pruning(f"random-s{seed}", 60 + 5 * seed, seed=seed) for seed in (2, 0, 1)]
    (only,) = tables.of_cells([cell("dense", "pope", 90), *cells, pruning("other", 70, use="gate", flops=0.2)])
    dense, other, seeded = only.rows
    assert (dense.pipeline, other.pipeline, seeded.pipeline) == ("dense", "other", "random-s0")
    assert sorted(seeded.seeds) == [0.6, 0.65, 0.7] and not other.seeds
    assert seeded.average.value == pytest.approx(0.65)
    assert (other.to_random.other, other.to_random.difference.value) == ("random-s0", pytest.approx(0.05))
    assert rendering.columns(only)["Seeds"] == ["", "", "3: 60.0–70.0"]
    assert "Δ random" in rendering.markdown(only) and "random-s0" in shown(only)


def test_seeds_of_one_name_are_not_older_versions_but_another_keep_is():
    cells = [pruning("random", 60, created="1"), pruning("random", 70, seed=1, created="2")]
    (only,) = tables.of_cells(cells)
    assert len(only.rows[0].seeds) == 2 and not any("older" in note for note in only.notes)
    again = dataclasses.replace(cells[1], created="3", pipeline=dataclasses.replace(cells[1].pipeline, sha="newer"))
    assert len(tables.of_cells([*cells, again])[0].rows[0].seeds) == 2  # the same seed again
    wider = dataclasses.replace(
        cells[1].pipeline, sha="wide", resolved=cells[1].pipeline.resolved.replace("keep: 0.1", "keep: 0.2")
    )
    (only,) = tables.of_cells([*cells, dataclasses.replace(cells[1], pipeline=wider, created="3")])
    assert only.rows[0].seeds == () and any("2 cells of older" in note for note in only.notes)


def test_a_seed_without_a_task_of_the_others_is_left_out():
    whole = [pruning("r", 60), dataclasses.replace(pruning("r", 50), task="gqa", label="micro/gqa")]
    (only,) = tables.of_cells([*whole, pruning("r-1", 90, seed=1)])
    assert [(row.pipeline, row.average.value, row.seeds) for row in only.rows] == [("r", pytest.approx(0.55), ())]
    assert "1 of 2 seeds of r left out, for lack of tasks that others have" in only.notes


def test_intervals_are_wider_where_questions_share_images():
    (apart,) = tables.of_cells([pruning("p", 70, group=str)])
    (shared,) = tables.of_cells([pruning("p", 70, group=lambda number: str(number // 5))])
    assert (apart.images, shared.images) == ({"micro/pope": 100}, {"micro/pope": 20})
    assert shared.rows[0].average.half > 1.8 * apart.rows[0].average.half
    assert not any("image" in note for note in (*apart.notes, *shared.notes))


def test_questions_without_an_image_stand_for_themselves_and_it_is_said():
    (only,) = tables.of_cells([pruning("p", 70, group=lambda number: "one" if number < 50 else None)])
    assert only.images == {"micro/pope": 51}
    assert any("micro/pope name no image for some questions" in note for note in only.notes)


def test_what_holds_is_said_and_marked():
    cells = [cell("dense", "pope", 90), cell("much", "pope", 50, flops=0.2), cell("little", "pope", 89, flops=0.2)]
    (only,) = tables.of_cells(cells)
    said = "dense beats much (5 %, after Holm's correction over 2 comparisons)"
    assert only.verdicts == (said, "only little can be the best pruned row (95 % model confidence set)")
    assert only.best == ("little",)
    dense, little, much = rendering.columns(only)["Δ dense"]
    assert (dense, little.endswith("*"), much.endswith("*")) == ("", False, True)
    assert said in shown(only) and f"D{said[1:]}" in rendering.markdown(only)
    data = json.loads(json.dumps(only.to_json()))
    assert [row["to_dense"] and row["to_dense"]["holds"] for row in data["rows"]] == [None, 0, -1]
    assert data["could_be_best"] == ["little"] and data["rows"][2]["to_dense"]["losses"] == 40
    assert data["rows"][2]["difference"] == data["rows"][2]["to_dense"]["difference"]


def test_many_rows_are_counted_not_named():
    (only,) = tables.of_cells([cell("dense", "pope", 90), *(cell(f"p{i}", "pope", 40, flops=0.2) for i in range(9))])
    assert only.verdicts[0] == "dense beats 9 rows (marked *) (5 %, after Holm's correction over 9 comparisons)"
    assert len(only.best) == 9


@pytest.mark.parametrize(("dense", "ours"), [(100, 100), (0, 0), (100, 0)])
def test_all_right_and_all_wrong(dense, ours):
    (only,) = tables.of_cells([cell("dense", "pope", dense), cell("p", "pope", ours, flops=0.5)])
    change = only.rows[1].difference
    assert change.value == (ours - dense) / 100 and -1 <= change.low <= change.value <= change.high <= 1
    assert change.low < change.high
    assert only.rows[1].to_dense.holds == (-1 if dense > ours else 0)


def test_the_questions_that_downsampling_gets_wrong_are_asked_of_every_row():
    small = json.dumps({"name": "small", "stages": [{"use": "downsample", "scale": 0.5}]})
    cells = [cell("dense", "pope", 100), cell("ours", "pope", 90), cell("small", "pope", 60)]
    cells += [cell("dense", "gqa", 90), cell("ours", "gqa", 85), cell("small", "gqa", 80)]
    named = [one if one.pipeline.name != "small" else with_pipeline(one, small) for one in cells]
    (only,) = tables.of_cells(named)
    hard = {row.pipeline: row.hard.value for row in only.rows}
    assert only.hard == 60 and hard == pytest.approx({"dense": 50 / 60, "ours": 35 / 60, "small": 0})
    assert only.rows[0].hard.low < 50 / 60 < only.rows[0].hard.high
    assert rendering.columns(only)["Hard"][0].startswith("83.3 ±")
    (without,) = tables.of_cells(cells)
    assert without.rows[0].hard is None and "Hard" not in rendering.columns(without)


def with_pipeline(one, resolved):
    return dataclasses.replace(one, pipeline=dataclasses.replace(one.pipeline, resolved=resolved))
