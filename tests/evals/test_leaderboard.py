"""The board: what is read, which rows stand in one table, and what stands behind each."""

import dataclasses
import json
import math
import random
import shlex
from pathlib import Path

import pytest
from board_cells import CONDITIONS, cell, complete, dense, under, written
from prunekit_evals.leaderboard import board, columns, commands, points, text
from prunekit_evals.run import reading, results
from prunekit_evals.run.annotated import check
from prunekit_evals.run.results import Cell

import prunekit
from prunekit.cli.main import parser
from prunekit.errors import InputError


def of(*cells):
    return board.of_cells(cells)


# What is read.


def test_cells_of_several_folders_and_single_files_once_and_the_newest_of_each(tmp_path):
    old, new = dense(created="1", hits=0.1), dense(created="2")
    here, there = written(tmp_path / "a", [old, cell("p")]), written(tmp_path / "b", [new])
    (tmp_path / "b" / "link").symlink_to(tmp_path / "b", target_is_directory=True)
    alone = written(tmp_path / "c", [cell("q")])
    file = results.path_of(alone, cell("q")).rename(tmp_path / "renamed.txt")
    found = reading.read([here, there, file, here])
    assert sorted((one.pipeline.name, one.created) for one in found.cells) == [("dense", "2"), ("p", "1"), ("q", "1")]
    assert found.skipped == ()
    with pytest.raises(InputError, match=r"no results folder .*nowhere.*prunekit eval"):
        reading.read([tmp_path / "nowhere"])


def spoiled(**changed):
    data = json.loads(json.dumps(cell("p").to_json()))
    for path, value in changed.items():
        inside = data
        *above, last = path.split("__")
        for key in above:
            inside = inside[int(key) if key.isdecimal() else key]
        inside[last] = value
    return json.dumps(data)


DAMAGED = {
    "empty": ("", "not a result"),
    "half": (json.dumps(cell("p").to_json())[:900], "not a result"),
    "a list": ("[1]", "holds no mapping"),
    "deep": ("[" * 100_000, "nested too deeply"),
    "other version": (spoiled(schema=2), "schema 2; a newer prunekit wrote it"),
    "other kind": (spoiled(kind="lm-eval"), "kind 'lm-eval'"),
    "further key": (spoiled(surprise=1), "a cell with 'surprise', which this version does not know"),
    "name of no text": (spoiled(pipeline__name=7), "pipeline.name is 7"),
    "NaN score": (spoiled(questions__3__score=math.nan), "questions[3].score is nan"),
    "score of 7": (spoiled(questions__3__score=7), "question 3 has score 7, not in [0, 1]"),
    "score of text": (spoiled(questions__0__score="0.5"), "questions[0].score is '0.5'"),
    "infinite FLOPs": (spoiled(saved__flops_fraction=math.inf), "saved.flops_fraction is inf"),
    "huge time": (spoiled(timing__prefill_ratio=-math.inf), "timing.prefill_ratio is -inf"),
    "status": (spoiled(status="fine"), "status is 'fine'"),
    "metric of text": (spoiled(metrics__x="high"), "metrics['x'] is 'high'"),
    "metrics": (spoiled(metrics=[1]), "metrics is [1]"),
    "no YAML": (spoiled(pipeline__resolved="a: [b"), "pipeline.resolved is no YAML"),
    "no pipeline": (spoiled(pipeline__resolved="stages: [1]"), "pipeline.resolved is no pipeline"),
    "anchors": (spoiled(pipeline__resolved="a: &a [1]\nb: [*a, *a]"), "pipeline.resolved has anchors"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_cell_is_named_and_left_out(name, tmp_path):
    content, why = DAMAGED[name]
    written(tmp_path, [dense()])
    bad = tmp_path / "pope.0123456789.json"
    bad.write_text(content)
    found = reading.read([tmp_path])
    assert [one.pipeline.name for one in found.cells] == ["dense"]
    ((path, said),) = [(one.path, one.why) for one in found.skipped]
    assert path == bad and why in said


def test_foreign_files_are_named_but_not_what_a_run_leaves_or_what_is_hidden(tmp_path):
    written(tmp_path, [dense()])
    for name in ("notes.txt", "model/summary.json", "data/micro/a.json", "model/p/pope.files/x.csv", ".git/config"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    (tmp_path / "model/p/pope.0123456789.journal.jsonl").write_text("{}")
    found = reading.read([tmp_path])
    assert [str(one.path.relative_to(tmp_path)) for one in found.skipped] == ["model/summary.json", "notes.txt"]
    assert "no result of `prunekit eval`" in str(found.skipped[0])


def test_metrics_of_other_code_may_be_nan(tmp_path):
    written(tmp_path, [dataclasses.replace(dense(), metrics={"x,none": math.nan})])
    assert len(reading.read([tmp_path]).cells) == 1


def test_a_sound_cell_has_nothing_to_say():
    assert check(Cell)(cell("p")) == "" and check(Cell)("p") == " is 'p'"
    assert check(Cell)(dataclasses.replace(cell("p"), unsound=True)) == ".unsound is True"


# Which rows stand in one table.


def test_different_conditions_have_sections_the_newest_first_which_say_what_is_apart():
    half = under(dtype="bfloat16", versions={"prunekit": "0.2.0"})
    made = of(dense(created="1"), cell("p", created="1"), dense(created="2", conditions=half))
    newest, older = made.sections
    assert newest.apart == {"dtype": "bfloat16", "prunekit version": "0.2.0"}
    assert older.apart == {"dtype": "float32", "prunekit version": "0.1.0"}
    assert [entry.row.pipeline for entry in older.entries] == ["dense", "p"] and made.cells == 3
    assert of(dense()).sections[0].apart == {}


@pytest.mark.parametrize("changed", [{"model": "b"}, {"system_prompt": "Be brief."}, {"prompt_profile": "qwen_vl"},
                                     {"device": "cuda"}, {"attention": "eager"}, {"limit": None}])  # fmt: skip
def test_models_prompts_and_devices_never_share_a_table(changed):
    assert len(of(dense(), dense(conditions=under(**changed))).sections) == 2


def test_machines_never_share_a_column():
    (only,) = of(dense(), cell("p", machine="A"), cell("q", machine="B", flops=0.4)).sections
    found = {column.name: column for column in columns.ranking(only.table)}
    assert [one.value for one in found["Time 1"].texts] == [1.0, 0.5, None]
    assert [one.value for one in found["Time 2"].texts] == [1.0, None, 0.4]
    assert "on B; not comparable" in found["Time 2"].meaning
    assert [axis.title.partition(", on ")[2] for axis in points.axes(only)] == ["", "A", "B"]


def test_a_board_says_which_baseline_it_lacks_and_how_to_make_it():
    (whole,) = of(*complete("pope")).sections
    assert whole.missing == ()
    assert {entry.row.pipeline: entry.baseline for entry in whole.entries} == {
        "dense": "dense", "random-r11": "random", "pool-r11": "pool", "small": "downsample", "ours": "", "theirs": "",
    }  # fmt: skip
    (bare,) = of(cell("ours"), cell("ours", "gqa")).sections
    assert [one.baseline for one in bare.missing] == ["dense", "random", "pool", "downsample"]
    assert bare.missing[1].command.startswith("prunekit eval random-r25 --model org/model --tasks pope,gqa ")
    assert "no dense row" in str(bare.missing[0])
    for one in bare.missing:
        prunekit.load(shlex.split(one.command)[2])


def test_what_failed_everywhere_has_no_section():
    failed = dataclasses.replace(cell("p"), status="failed", error="broke", questions=(), saved=None, timing=None)
    assert of(failed).sections == ()
    (only,) = of(failed, dense()).sections
    assert "p on pope failed: broke" in only.table.notes


# What stands behind a row.


def test_the_command_of_a_row_asks_for_what_its_cells_record():
    odd = under(model="my model", system_prompt="it's <b>", dtype="bfloat16", attention="eager", max_new_tokens=7,
                honor_until="all", prompt_profile="qwen_vl", limit=None)  # fmt: skip
    words = shlex.split(commands.command("p.yaml", odd, ["pope", "gqa", "pope"]))
    asked = parser().parse_args(words[1:])
    assert (asked.pipelines, asked.tasks, asked.no_dense) == (["p.yaml"], "pope,gqa", True)
    assert asked.attn == odd.attention
    for field in ("model", "system_prompt", "dtype", "max_new_tokens", "honor_until", "prompt_profile", "limit",
                  "batch_size", "device"):  # fmt: skip
        assert getattr(asked, field) == getattr(odd, field), field
    plain = parser().parse_args(shlex.split(commands.command("p", under(dtype="checkpoint"), ["pope"]))[1:])
    assert (plain.dtype, plain.attn, plain.prompt_profile, plain.limit) == (None, None, None, 100)


def test_a_shipped_pipeline_goes_by_its_name_and_another_by_a_file():
    shipped = prunekit.load("random-r11")
    known = dataclasses.replace(cell("random-r11").pipeline, resolved=shipped.resolved)
    assert commands.source(known) == "random-r11"
    assert commands.source(dataclasses.replace(known, resolved="stages: []\n")) == "random-r11.yaml"
    assert commands.source(cell("../a <b>/c").pipeline) == "a-b-c.yaml"


def test_seeds_are_one_entry_with_a_command_for_each():
    seeded = [dataclasses.replace(one, pipeline=dataclasses.replace(one.pipeline, resolved=
              f"name: {one.pipeline.name}\nstages:\n- use: random\n  seed: {seed}\n"))
              for seed in (0, 1) for one in (cell(f"r{seed}"), cell(f"r{seed}", "gqa"))]  # fmt: skip
    (section,) = of(*seeded).sections
    (entry,) = section.entries
    assert (entry.seeds, entry.baseline, len(entry.cells)) == (("0", "1"), "random", 4)
    assert [(shlex.split(one.command)[2], one.file) for one in entry.runs] == [("r0.yaml",) * 2, ("r1.yaml",) * 2]
    assert ["seed: 0" in one.yaml for one in entry.runs] == [True, False]


# What the plots show.


def test_the_front_is_what_nothing_cheaper_or_as_cheap_reaches():
    draw = random.Random(0)
    for _ in range(30):
        shown = [(draw.randint(1, 9) / 10, draw.randint(0, 5) / 10) for _ in range(draw.randint(0, 12))]
        naive = {
            one for one in shown
            if not any(c <= one[0] and a >= one[1] and (c, a) != one for c, a in shown)
        }  # fmt: skip
        assert points.front(shown) == naive


def test_names_of_the_front_do_not_cover_each_other():
    close, far = [(0.0, 0.5), (1.0, 99.0), (2.0, 100.0)], [(100.0, 100.0)]
    assert points.apart(close, close + far) == {(0.0, 0.5), (2.0, 100.0)}
    assert points.apart([(5.0, 5.0)], [(5.0, 5.0)]) == {(5.0, 5.0)} and points.apart([], []) == set()


def test_points_are_of_every_row_on_the_average_and_on_every_task():
    (section,) = of(*complete("pope", "gqa")).sections
    made = points.of_section(section)
    assert points.views(section) == ("average", "pope", "gqa")
    assert sorted((one["pipeline"], one["view"]) for one in made) == sorted(
        (entry.row.pipeline, view) for entry in section.entries for view in points.views(section)
    )
    ours = next(one for one in made if (one["pipeline"], one["view"]) == ("ours", "average"))
    assert (ours["flops"], ours["time0"], ours["kind"]) == (20.0, 20.0, "method")
    assert ours["low"] <= ours["accuracy"] <= ours["high"]
    row = next(entry.row for entry in section.entries if entry.row.pipeline == "ours")
    assert ours["low"] == round(100 * row.average.low, 2)  # the table's figures, none of its own
    best = max(one["accuracy"] for one in made if one["view"] == "average")
    assert any(one["flops_front"] and one["accuracy"] == best for one in made if one["view"] == "average")


def test_the_ends_of_a_time_are_those_of_its_tasks():
    slow = cell("p", "gqa")
    slow = dataclasses.replace(slow, timing=dataclasses.replace(slow.timing, prefill_ratio=0.7))
    (section,) = of(dense(), dense("gqa"), cell("p"), slow).sections
    (ours,) = [one for one in points.of_section(section) if (one["pipeline"], one["view"]) == ("p", "average")]
    assert (ours["time0"], ours["time0_low"], ours["time0_high"]) == (60.0, 50.0, 70.0)


def test_markdown_has_tables_commands_and_what_is_missing():
    said = text.markdown(of(*complete("pope"), dense(conditions=under(device="cuda"), created="2")))
    assert said.startswith("Tables of different conditions are not comparable.")
    assert said.count("| dense |") == 2 and "| ours |" in said
    assert "Note: no random row; make it:\n\n```\nprunekit eval random-r25" in said
    assert said.count("prunekit eval ours.yaml") == 1
    assert CONDITIONS.title() in said
    odd = text.markdown(of(cell("<b>|\n", conditions=under(system_prompt="````\n<i>"))))
    assert "| &lt;b>\\|  |" in odd and "<b>" not in odd and "\n`````\nprunekit" in odd


def test_the_committed_board_is_what_its_results_say():
    """Else: make leaderboard."""
    folder = Path(__file__).parents[2] / "docs" / "leaderboard"
    found = reading.read([folder / "results"])
    made = board.of_cells(found.cells)
    assert found.skipped == () and len(made.sections) == 1 and made.sections[0].missing == ()
    assert (folder / "board.md").read_text(encoding="utf-8") == text.markdown(made)
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert all(f">{row.pipeline}</summary>" in page for row in made.sections[0].table.rows)
    assert all(one.stat().st_size < 200_000 for one in folder.glob("*.png"))
    assert len(page.encode()) < 2_000_000
    assert sum(one.stat().st_size for one in folder.rglob("*.json")) < 4_000_000
