"""Grids and seeds: which pipelines they make, and what these are called."""

import pytest
from prunekit_evals.cli import commands
from prunekit_evals.compare import tables
from prunekit_evals.run import variants
from prunekit_evals.run.variants import Variation, expand, read_grid, suffix

import prunekit
from prunekit.cli.main import main
from prunekit.errors import InputError, SpecError

FASTV = {"name": "fastv", "stages": [{"use": "fastv", "at": 2, "keep": 0.25}]}
TWO = {"name": "two", "stages": [{"use": "random", "at": 1, "keep": 0.5}, {"use": "random", "at": 3, "keep": 0.25}]}


def made(source, **options):
    return [one.pipeline for one in expand(source, Variation(**options))]


def names(source, **options):
    return [one.name for one in made(source, **options)]


def test_a_grid_is_every_combination_and_the_file_itself_keeps_its_name():
    grid = {"stages.0.keep": ("0.5", "0.25"), "stages[0].at": ("1", "2")}
    found = {one.name: one for one in made(FASTV, grid=grid)}
    assert list(found) == ["fastv-keep-0.5-at-1", "fastv-keep-0.5-at-2", "fastv-keep-0.25-at-1", "fastv"]
    assert [stage.keeps[0].fraction for one in found.values() for stage in one.stages] == [0.5, 0.5, 0.25, 0.25]
    assert len({one.sha for one in found.values()}) == 4


def test_overrides_of_all_variants_are_in_the_name_too():
    """Two calls with other overrides on one folder are two rows, not two versions of one."""
    assert names(FASTV, overrides=("stages[0].keep=0.5",)) == ["fastv-keep-0.5"]
    assert names(FASTV, overrides=("stages[0].keep=0.25",)) == ["fastv"]  # as the file has it
    assert names(FASTV, overrides=("name=mine", "stages[0].keep=0.5")) == ["mine-keep-0.5"]
    assert names(FASTV, overrides=("name=mine",)) == ["mine"]


def test_keys_that_end_alike_are_told_apart():
    grid = {"stages.0.keep": ("0.75",), "stages.1.keep": ("0.5",)}
    assert names(TWO, grid=grid) == ["two-stages.0.keep-0.75-stages.1.keep-0.5"]
    assert suffix(["stages[0].layers=[3, 4]", "positions=null"]) == "-layers-3-4-positions-null"


def test_seeds_are_drawn_from_the_first_on_and_only_where_there_is_one():
    assert names(FASTV, seeds=3) == ["fastv"]
    found = made(TWO, overrides=("stages[1].seed=7",), seeds=3)
    assert [one.name for one in found] == ["two-seed-7", "two-seed-7-s1-8", "two-seed-7-s2-9"]
    assert [variants.drawn(one) for one in found] == [{0: 0, 1: 7}, {0: 1, 1: 8}, {0: 2, 1: 9}]


def test_a_grid_is_read_as_yaml_would_be():
    read = read_grid(["stages.0.layers=[3,4],[5]", "a='x,y',z"])
    assert read == {"stages.0.layers": ("[3,4]", "[5]"), "a": ("'x,y'", "z")}
    for texts, said in (
        (["keep"], "is not KEY=V,V"),
        (["=0.5"], "is not KEY=V,V"),
        (["a..b=1"], "is not KEY=V,V"),
        (["a=1,,2"], "empty value"),
        (["a="], "empty value"),
        (["a=1,2,1"], "names 1 twice"),
        (["a=1", "a=2"], "names a twice"),
        (["name=x,y"], "`name` is none"),
        ([f"k{i}=1,2,3,4,5,6,7,8,9,0" for i in range(5)], "100000 pipelines"),
    ):
        with pytest.raises(InputError, match=said):
            read_grid(texts)


def test_faults_of_all_values_are_said_at_once():
    with pytest.raises(SpecError) as caught:
        expand(FASTV, Variation(grid={"stages.0.keep": ("7", "0.5", "0")}))
    assert "not 7" in str(caught.value) and "not 0 " in str(caught.value)
    with pytest.raises(SpecError, match="at most 100"):
        expand(FASTV, Variation(grid={"stages.0.keep": ("0." + "5" * 120,)}))


def test_rows_of_a_grid_stand_beside_each_other(checkpoint, data_root, pipeline_file, tmp_path, capsys):
    path = pipeline_file("some", {"use": "random", "at": 2, "keep": 0.25})
    words = (
        "eval", path, "--grid", "stages.0.keep=0.5,0.25", "--seeds", 2, "--tasks", "pope", "--model", checkpoint,
        "--data-root", data_root, "--out", tmp_path / "out", "--device", "cpu", "--limit", 4, "--no-timing",
    )  # fmt: skip
    assert main([str(word) for word in words]) == 0
    capsys.readouterr()
    (table,), _ = tables.tables(tmp_path / "out")
    assert {row.pipeline: len(row.seeds) for row in table.rows} == {"dense": 0, "some-keep-0.5": 2, "some": 2}
    assert sorted(path.name for path in (tmp_path / "out").glob("*/*")) == [
        "dense", "some", "some-keep-0.5", "some-keep-0.5-s1", "some-s1",
    ]  # fmt: skip


def test_seeds_of_what_draws_nothing_are_said_to_be_none(monkeypatch, capsys, pipeline_file):
    monkeypatch.setattr(commands, "ready", lambda namespace: None)
    monkeypatch.setattr(commands, "plan_of", lambda namespace, pipelines: (_ for _ in ()).throw(InputError("enough")))
    path = str(pipeline_file("fastv", *FASTV["stages"]))
    assert main(["eval", path, "--model", "micro", "--tasks", "pope", "--seeds", "3"]) == 2
    assert "none of these pipelines draws at random" in capsys.readouterr().err


def test_a_variant_loads_from_what_it_resolved_to():
    """As other processes are handed it."""
    for one in made(TWO, grid={"stages.0.keep": ("0.75", "0.6")}, seeds=2):
        assert prunekit.load(one.resolved).sha == one.sha
