"""Cells on disk: whole or not there, and told apart by everything they depend on."""

import dataclasses
import json

import pytest
from prunekit_evals.run import files, reading, results
from prunekit_evals.run.results import Cell, Conditions, PipelineId, Question, Saved, Timing

from prunekit.errors import InputError

CONDITIONS = Conditions(
    model="micro", identity="abc", data="d1", limit=200, batch_size=8, dtype="float32", device="cpu",
    attention="default", max_new_tokens=1024, system_prompt="", honor_until="stops", prompt_profile="",
    versions={"prunekit": "0.1.0"},
)  # fmt: skip
PIPELINE = PipelineId("fastv-k2", "0123456789abcdef", False, "name: fastv-k2\n", "c0de")
CELL = Cell(
    id=results.cell_id(CONDITIONS, PIPELINE, "pope"), status="done", task="pope", label="micro/pope", pipeline=PIPELINE,
    conditions=CONDITIONS, created="2026-01-01T00:00:00+00:00", metrics={"pope_accuracy,none": 0.5},
    questions=(Question(0, "yes", 1.0), Question(1, "nö", 0.0, "p1"), Question(2, "?", None)),
    saved=Saved(144, 36, 1e9, 2e9, 0.5, 10, 20, 0.5), timing=Timing(0.1, 2, 1, 10.0, 20.0, 0.5, 8, 5), notes=("n",),
)  # fmt: skip


def test_a_cell_comes_back(tmp_path):
    path = results.path_of(tmp_path, CELL)
    results.write(path, CELL)
    assert results.read(path) == CELL
    assert reading.read([tmp_path]).cells == (CELL,)
    assert (CELL.scores, CELL.groups) == ({0: 1.0, 1: 0.0}, {1: "p1"})
    assert path.relative_to(tmp_path).as_posix() == f"micro/fastv-k2/pope.{CELL.id}.json"


def test_every_condition_makes_another_cell():
    changed = {
        "model": "other", "identity": "x", "data": "x", "limit": None, "batch_size": 1, "dtype": "float16",
        "device": "cuda", "attention": "eager", "max_new_tokens": 1, "system_prompt": "x", "honor_until": "all",
        "prompt_profile": "qwen_vl", "versions": {"prunekit": "0.2.0"}, "subset_seed": 3, "max_frames": 8, "fps": 1.0,
    }  # fmt: skip
    assert set(changed) == {field.name for field in dataclasses.fields(Conditions)}
    others = [dataclasses.replace(CONDITIONS, **{key: value}) for key, value in changed.items()]
    ids = {results.cell_id(other, PIPELINE, "pope") for other in others}
    ids |= {results.cell_id(CONDITIONS, dataclasses.replace(PIPELINE, sha="f"), "pope")}
    ids |= {results.cell_id(CONDITIONS, dataclasses.replace(PIPELINE, code="f"), "pope")}
    ids |= {results.cell_id(CONDITIONS, PIPELINE, "mme"), CELL.id}
    assert len(ids) == len(changed) + 4


def test_a_failed_write_leaves_the_old_cell(tmp_path, monkeypatch):
    path = results.path_of(tmp_path, CELL)
    results.write(path, CELL)
    monkeypatch.setattr(files.os, "replace", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(files.CannotWrite, match="cannot be written: disk full"):
        results.write(path, dataclasses.replace(CELL, notes=("new",)))
    assert results.read(path) == CELL
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("text", ["", "[]", "{", '{"kind": "prunekit-cell", "schema": 99}', "\x00"])
def test_a_damaged_file_is_named(tmp_path, text):
    path = tmp_path / "pope.0123456789.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"pope\.0123456789\.json"):
        results.read(path)


def test_a_cell_that_lacks_a_part_is_damaged(tmp_path):
    data = CELL.to_json()
    del data["pipeline"]["sha"]
    path = tmp_path / "pope.0123456789.json"
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match="damaged"):
        results.read(path)


def test_a_model_path_becomes_a_folder_name(tmp_path):
    inside = results.cell_path(tmp_path, dataclasses.replace(CONDITIONS, model="/home/me/my model"), PIPELINE, "pope")
    hub = results.cell_path(tmp_path, dataclasses.replace(CONDITIONS, model="llava-hf/llava-1.5"), PIPELINE, "pope")
    up = results.cell_path(tmp_path, dataclasses.replace(CONDITIONS, model="../../x"), PIPELINE, "pope")
    assert inside.parent.parent == tmp_path / "my-model"
    assert hub.parent.parent == tmp_path / "llava-hf-llava-1.5"
    assert up.parent.parent == tmp_path / "x"
