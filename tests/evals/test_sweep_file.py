"""Sweep files: what they ask for, and every way in which they are wrong."""

import textwrap

import pytest
from prunekit_evals.sweep import calibrations, orders, spec
from prunekit_evals.sweep.orders import Where, ordered
from prunekit_evals.sweep.queue import Queue

from prunekit.errors import InputError, SpecError

FULL = """\
name: small
vars: {keep: 0.25}
models:
  - MODEL
tasks: [pope, mme]
seeds: 2
limit: 4
batch_size: 2
pipelines:
  - random-r25
  - pipeline: fastv-k2-r25
    set: {stages.0.at: 1}
    grid:
      stages.0.keep: ["${vars.keep}", 0.5]
  - name: own
    stages: [{use: stride, at: 2, keep: "${vars.keep}"}]
  - pipeline: beside.yaml
    name: other
"""


@pytest.fixture
def sweep(tmp_path, checkpoint):
    """Writes a sweep file over the tiny model: `sweep("tasks: [pope]\\n...")` gives its path."""

    def write(text, name="sweep.yaml"):
        path = tmp_path / name
        path.write_text(textwrap.dedent(text).replace("MODEL", str(checkpoint)))
        return path

    return write


def names(found):
    import prunekit

    return [prunekit.load(text).name for text in found.orders[0].pipelines]


def test_a_sweep_is_the_product_of_what_it_names(sweep, tmp_path, checkpoint, data_root):
    sweep("stages: [{use: pool, at: 2, keep: 0.25}]\n", "beside.yaml")
    path = sweep(FULL + f"data_root: {data_root}\n")
    found = ordered(spec.load(path), Where(tmp_path / "out"))
    (order,) = found.orders
    assert names(found) == [
        "dense", "random-r25", "random-r25-s1", "fastv-k2-r25-at-1-keep-0.25", "fastv-k2-r25-at-1-keep-0.5", "own",
        "other",
    ]  # fmt: skip
    assert (order.model, order.tasks, len(found.jobs)) == (str(checkpoint), ("pope", "mme"), 14)
    plan = orders.plan_of(order)
    assert (plan.limit, plan.batch_size, plan.timing, plan.force) == (4, 2, True, False)
    overrides = ["limit=2", "tasks=[pope]", "dense=false", "pipelines=[random-r25]"]
    fewer = ordered(spec.load(path, overrides), Where(tmp_path))
    assert names(fewer) == ["random-r25", "random-r25-s1"] and orders.plan_of(fewer.orders[0]).limit == 2


def test_sweeps_extend_each_other(sweep, data_root, tmp_path):
    sweep(f"models: MODEL\ntasks: pope\ndata_root: {data_root}\npipelines: [random-r25]\n", "base.yaml")
    found = ordered(spec.load(sweep("extends: base.yaml\npipelines: [stride-r11]\n")), Where(tmp_path))
    assert names(found) == ["dense", "stride-r11"]


OPEN = """\
models: MODEL
tasks: pope
pipelines:
  - {name: late, stages: [{use: random, at: 3}]}
  - {name: two, stages: [{use: random, at: 1}, {use: stride, at: 2, keep: 0.9}]}
  - {name: shut, stages: [{use: random, at: 1, keep: 0.5}]}
budgets: [{layer_mean: 0.5}, {layer_mean: 0.8}]
"""


def test_budgets_solve_open_stages_and_refuse_with_the_floor(sweep, data_root, tmp_path):
    path = sweep(OPEN + f"data_root: {data_root}\n")
    with pytest.raises(SpecError) as caught:
        ordered(spec.load(path), Where(tmp_path))
    told = str(caught.value).splitlines()
    assert len(told) == 3 and all("--skip-infeasible" in line for line in told)
    assert "sweep.yaml:4:5: pipelines[0].late-layer_mean-0.5" in told[0]
    assert "0.5 cannot be reached: with one token at every open stage it is still 0.7656" in told[0]
    assert "sweep.yaml:6:5: pipelines[2].shut-layer_mean-0.5: no stage is left open" in told[1]
    found = ordered(spec.load(path), Where(tmp_path, skip_infeasible=True))
    assert names(found) == ["dense", "late-layer_mean-0.8", "two-layer_mean-0.5", "two-layer_mean-0.8"]
    assert len(found.skipped) == 3
    assert any("asks for 0.9" in note and "leaves" in note for note in found.notes)


WRONG = {
    "keys": (
        "modles: x\ntasks: pope\npipelines: [a]\n",
        ["F:1:1: modles: unknown key (did you mean 'models'?", "models: is missing"],
    ),
    "empty": ("", ["F:1:1: is empty (a sweep needs at least `pipelines:`)"]),
    "list": ("- a\n", ["must be a mapping with `pipelines:`"]),
    "types": (
        "models: [3]\ntasks: [[x]]\npipelines: [7, {pipeline: 3}, {use: fastv}]\nseeds: 0\nlimit: many\ntiming: maybe\n"
        "budgets: [{flops: 2}]\nhonor_until: never\n",
        [
            "F:1:10: models[0]: must be a name, or a mapping with `model:`, not 3",
            "F:2:9: tasks[0]: must be text, not a list",
            "F:3:13: pipelines[0]: must be the name or file of a pipeline",
            "F:3:27: pipelines[1].pipeline: must be text, not 3",
            "pipelines[2].use: unknown key", "pipelines[2].pipeline: is missing",
            "F:4:8: seeds: must be a whole number", "F:5:8: limit: must be a whole number",
            "F:6:9: timing: must be true or false", "budgets[0].flops: must be a fraction in (0, 1], not 2",
            "F:8:14: honor_until: must be 'stops', 'all' or 'none', not 'never'",
        ],
    ),
    "grids": (
        "models: m\ntasks: t\npipelines:\n- {pipeline: a, grid: {k: 3, name: [a], j: [1, 1]}, set: [x]}\n",
        [
            "grid.k: must be a list of values", "grid.name: is no key to set", "grid.j[1]: 1 stands here twice",
            "set: must be a mapping",
        ],
    ),
    "nameless": (
        "models: m\ntasks: t\npipelines: [{stages: [{use: dense}]}]\n", ["F:3:13: pipelines[0].name: is missing"],
    ),
    "nothing": ("models: []\ntasks: pope\npipelines: [a]\n", ["F:1:9: models: is empty"]),
}  # fmt: skip


@pytest.mark.parametrize("text, told", WRONG.values(), ids=WRONG)
def test_every_fault_of_a_file_is_told_at_its_place(sweep, text, told):
    path = sweep(text)
    with pytest.raises(SpecError) as caught:
        spec.load(path)
    said = str(caught.value).replace(str(path), "F")
    assert [one for one in told if one not in said] == [], said
    assert len(said.splitlines()) == len(told)


def test_what_does_not_exist_is_told_all_at_once(sweep, tmp_path):
    text = """\
    models: [MODEL, mikro]
    tasks: [popee, gqa, mmbench]
    pipelines:
      - fastw
      - pipeline: fastv-k2-r25
        grid: {stages.0.keep: [0.5, 7], stages.0.at: [1, 77]}
      - name: own
        stages:
          - {use: fastv, at: 77, keep: 0.5}
          - {use: striede, at: 1, keep: 0.5}
      - ./missing.yaml
    """
    path = sweep(text)
    with pytest.raises(SpecError) as caught:
        ordered(spec.load(path), Where(tmp_path))
    said = str(caught.value).replace(str(path), "F")
    for told in (
        "models[1]: unknown model 'mikro' (did you mean 'micro'?",
        "F:2:9: tasks[0]: unknown task 'popee' (did you mean 'pope'?",
        "tasks[2]: 'mmbench' is a group",
        "F:4:5: pipelines[0]: no such file: 'fastw'",
        "F:6:27: pipelines[1].stages[0].keep: must be a fraction in (0, 1], not 7",
        "F:10:15: pipelines[2].stages[1].use: unknown strategy 'striede'",
        "pipelines[3]: no such file",
    ):  # fmt: skip
        assert told in said, f"{told}\n{said}"


def test_pipelines_of_one_name_are_refused(sweep, tmp_path, data_root):
    one = "{name: a, stages: [{use: random, at: 1, keep: 0.5}]}"
    text = f"models: MODEL\ntasks: pope\ndata_root: {data_root}\npipelines: [{one}, {one.replace('0.5', '0.25')}]\n"
    with pytest.raises(InputError, match="two pipelines are called 'a'"):
        ordered(spec.load(sweep(text)), Where(tmp_path))


def test_workers_stay_where_they_are_prepared():
    jobs = [orders.Job(order, task, pipeline) for order in (0, 1) for task in (0, 1) for pipeline in (0, 1)]
    queue = Queue(list(jobs), retries=1)
    first = queue.take(None, []).job
    second = queue.take(None, [first.place]).job
    assert (first.place, second.place) == ((0, 0), (0, 1))
    assert queue.take(first.place, [second.place]).job.place == first.place
    assert queue.take(first.place, [second.place]).job.place == (0, 1)  # the model that it has, before another one
    assert queue.take((0, 1), [(0, 0)]).job.place == (1, 0)


def test_a_cell_at_which_workers_die_is_given_up():
    job = orders.Job(0, 0, 0)
    queue = Queue([job, orders.Job(0, 0, 1)], retries=1)
    for expected in (None, None, "2 workers died at it, the last: killed by SIGKILL"):
        given = queue.take(None, [])
        assert (given.job, given.lost) == (job, expected)
        queue.died(job, "killed by SIGKILL")


CALIBRATED = """\
models: MODEL
tasks: pope
calibrate:
  - {out: made/c.json, pipeline: {name: c, stages: [{use: shortgpt, drop: 1}]}, data: micro-scenes, prompts: 2}
pipelines:
  - {name: gpt, stages: [{use: shortgpt, drop: 1, calibration: made/c.json}]}
"""


def test_a_sweep_makes_the_calibrations_that_its_pipelines_name(sweep, tmp_path, data_root, capsys, monkeypatch):
    from prunekit.cli.main import main

    path = sweep(CALIBRATED + f"data_root: {data_root}\n")
    monkeypatch.chdir(data_root)  # paths start at the file
    assert main(["sweep", str(path), "--dry-run"]) == 2
    assert "c.json' is to be calibrated first" in capsys.readouterr().err
    read = spec.load(path)
    for one in calibrations.missing(read):
        calibrations.make(read, one, False)
    assert (tmp_path / "made" / "c.json").is_file() and calibrations.missing(read) == []
    assert main(["sweep", str(path), "--dry-run"]) == 0 and "gpt" in capsys.readouterr().out
    path = sweep("models: [a, b]\ntasks: t\npipelines: p\ncalibrate: [{out: x, data: d}]\n")
    with pytest.raises(SpecError) as caught:
        spec.load(path)
    assert "4:1: calibrate: a calibration is of one model" in str(caught.value)
    assert "calibrate[0].pipeline: is missing" in str(caught.value)
