"""The sweep behind the second section of the committed board: from what is registered, and without a fault."""

from dataclasses import replace

import pytest
from board_cells import CONDITIONS, cell, dense, written
from prunekit_evals.run import reading, results
from prunekit_evals.studies.board import __main__ as study
from prunekit_evals.studies.board import sweep
from prunekit_evals.sweep import spec

import prunekit
from prunekit import loading, plugins


def test_the_file_is_what_is_registered():
    """Else: make leaderboard BOARD_ARGS="--model smol"."""
    assert study.SWEEP.read_text(encoding="utf-8") == sweep.written()


def test_every_strategy_that_fits_is_in_it_at_three_shares():
    asked = spec.load(study.SWEEP)
    shape = loading.load_shape(sweep.MODEL)
    rows: dict[str, list[dict]] = {}
    for choice in asked.pipelines:
        (stage,) = choice.source.plain()["stages"]
        rows.setdefault(stage["use"], []).append(stage)
    assert [stage["keep"] for stage in rows["fastv"]] == [0.5, 0.25, 0.11]
    assert len(rows["pyramiddrop"]) == 3 and len(rows["vtw"]) == 1
    for entry in plugins.registry().strategies():
        if entry.name not in rows and entry.name != "dense":
            with pytest.raises(prunekit.errors.PrunekitError):
                prunekit.load({"stages": [{"use": entry.name}]}).bind(shape)
    made = {one.out.name for one in asked.calibrations}
    assert made == {f"{name}-smol.json" for name in ("fitprune", "shortgpt", "shortv")}


def test_a_section_leaves_the_other_one_alone(tmp_path):
    """Files of the other model's cells stay; those of its own that nothing asks for go."""
    other = replace(CONDITIONS, model="micro")
    cells = [dense(), cell("kept"), cell("stale"), dense(conditions=other), cell("theirs", conditions=other)]
    written(tmp_path, cells)
    theirs = study._of_others(tmp_path, CONDITIONS.model)
    assert sorted(one.pipeline.name for one in theirs) == ["dense", "theirs"]
    assert study._of_others(tmp_path / "nothing", "micro") == []
    study._tidy(tmp_path, {results.path_of(tmp_path, one): one for one in [*cells[:2], *theirs]})
    found = {(one.conditions.model, one.pipeline.name) for one in reading.read([tmp_path]).cells}
    ours = CONDITIONS.model
    assert found == {(ours, "dense"), (ours, "kept"), ("micro", "dense"), ("micro", "theirs")}
