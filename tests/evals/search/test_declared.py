"""A search file: what it may say, what follows from the strategies, and every fault at its place."""

import pytest
from prunekit_evals.search.candidates import Fitter, Infeasible, described
from prunekit_evals.search.declared import read, space_of
from prunekit_evals.search.space import Choices, Range, Run, Sites

import prunekit
from prunekit import cost
from prunekit.errors import SpecError
from prunekit.strategy.decisions import ModelShape

SHAPE = ModelShape("llava", 32, 4096, 32, 128, 4 * 4096**2, 3 * 4096 * 11008, 2 * 4096, 576, 4096**2)
LEAST = {"model": "m", "tasks": ["pope"], "budget": {"flops": 0.4}}


def values(*names, **strategies):
    declared = read({**LEAST, "strategies": list(names) or strategies})
    return {one.use: one.values for one in space_of(declared, SHAPE).strategies}


def test_what_is_not_said_follows_from_the_strategy():
    found = values("divprune", "fastv", "pyramiddrop", "skip_layers", "random", "vtw")
    assert found["divprune"]["at"] == Sites(("encoder",), 1, 31)
    assert found["fastv"]["at"] == Sites((), 1, 31)
    assert found["fastv"]["rope"] == Choices((True, False))
    assert found["fastv"]["domain"].values[0] == "softmax" and len(found["fastv"]["domain"].values) == 3
    assert found["pyramiddrop"]["at"] == Choices((None,))  # its schedule
    assert found["skip_layers"]["layers"] == Run(1, 31, 8) and "at" not in found["skip_layers"]
    assert "seed" not in found["random"]
    assert "keep" not in found["vtw"] and set(found["divprune"]) == {"at", "keep", "keep_of"}


def test_what_is_said_goes_first():
    (found,) = values(fastv={"at": [[2, 8], 4], "keep": {"from": 0.1, "to": 0.5}, "rope": True}).values()
    assert found["at"] == Choices(([2, 8], 4)) and found["keep"] == Range(0.1, 0.5) and "keep_of" not in found
    assert found["rope"] == Choices((True,))


FILE = """\
modell: micro
tasks: []
name: ..
budget: {flops: 3}
trials: 0
factor: 2.5
strategies: [divprune, 7]
"""


def test_every_fault_of_a_file_at_its_place(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(FILE)
    with pytest.raises(SpecError) as caught:
        read(str(path))
    said = str(caught.value).replace(str(path), "F").splitlines()
    for line in (
        "F:1:1: model: is missing",
        "F:1:1: modell: unknown key (did you mean 'model'?",
        "F:2:8: tasks: is empty",
        "F:3:7: name: must be letters",
        "F:4:17: budget.flops: must be a fraction in (0, 1], not 3",
        "F:5:9: trials: must be at least 1, not 0",
        "F:6:9: factor: must be a whole number, not 2.5",
        "F:7:24: strategies: must be the name of a strategy, not 7",
    ):
        assert any(one.startswith(line) for one in said), (line, said)


VALUES = """\
model: m
tasks: [pope]
budget: {flops: 0.4}
strategies:
  fastw: {}
  fastv:
    at: [2, 50]
    rope: [true, 3]
    ropes: [1]
    keep: {from: 0.9, to: 0.1}
  skip_layers:
    layers: [6, 7]
  shortgpt: {}
"""


def test_values_that_no_stage_takes_at_their_places(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(VALUES)
    with pytest.raises(SpecError, match=r"bad\.yaml:10:11: strategies\.fastv\.keep: a range goes"):
        read(str(path))
    path.write_text(VALUES.replace("{from: 0.9, to: 0.1}", "0.5"))
    with pytest.raises(SpecError) as caught:
        space_of(read(str(path)), SHAPE)
    said = str(caught.value).replace(str(path), "F")
    assert "F:5:3: strategies.fastw: unknown strategy 'fastw' (did you mean 'fastv'?" in said
    assert "F:7:13: strategies.fastv.at: " in said and "no layer 50" in said
    assert "F:8:18: strategies.fastv.rope: must be true or false, not 3" in said
    assert "F:9:5: strategies.fastv.ropes: unknown key" in said
    assert "F:12:14: strategies.skip_layers.layers: must be a list" in said and "write [[...]]" in said
    assert "F:13:3: strategies.shortgpt.drop: is missing" in said


def test_overrides_and_files_that_are_none(tmp_path):
    path = tmp_path / "one.yaml"
    path.write_text("model: m\ntasks: [pope]\nbudget: {flops: 0.4}\nstrategies: [divprune]\n")
    assert read(str(path)).settings.name == "one"
    assert read(str(path), ["trials=40", "budget.flops=0.3"]).settings.trials == 40
    (tmp_path / "empty.yaml").write_text("")
    for source in (tmp_path, tmp_path / "empty.yaml"):
        with pytest.raises(SpecError, match=r"a search has `model`"):
            read(str(source))
    with pytest.raises(SpecError, match=r"no such file: .*did you mean '.*one\.yaml'"):
        read(str(tmp_path / "on.yaml"))


def fit(*stages, flops=0.4):
    fitter = Fitter(SHAPE, read({**LEAST, "budget": {"flops": flops}, "strategies": ["divprune"]}).budget)
    return fitter.fit(list(stages))


def test_the_last_stage_in_the_data_is_solved_to_the_budget():
    pipeline = fit(
        {"use": "random", "at": 8, "keep": 0.5, "keep_of": "current"},
        {"use": "skip_layers", "layers": [30]},
        {"use": "stride", "at": "encoder", "keep": 0.5, "keep_of": "current"},
    )
    assert [stage.use for stage in pipeline.stages] == ["stride", "random", "skip_layers"]
    bound = pipeline.bind(SHAPE)
    first, second = (cut.keep.count(576, current) for cut, current in zip(bound.cuts, (576, 288), strict=True))
    assert first == 288

    def of(kept):
        tokens = [288 + 64] * 8 + [kept + 64] * 23
        return cost.prefill_flops(SHAPE, tokens) / cost.prefill_flops(SHAPE, [576 + 64] * 32)

    assert of(second) <= 0.4 < of(second + 1)
    assert described(pipeline).startswith("stride at encoder keep 0.5 keep_of current, random at 8 seed 0, skip_layers")


@pytest.mark.parametrize(
    ("stages", "reason"),
    [
        ([{"use": "fastv", "at": 16, "keep": 0.5}], r"budget\.flops: 0\.4 cannot be reached"),
        ([{"use": "vtw", "at": 20}], r"takes no `keep` and costs up to 0\.6"),
        ([{"use": "dense"}], "it prunes nothing"),
        ([], "is empty"),
        ([{"use": "skip_layers", "layers": [1]}], "costs up to 0.96"),
        ([{"use": "vtw", "at": 4}, {"use": "fastv", "at": 8, "keep": 0.5}], "leaves no visual tokens"),
    ],
)
def test_what_cannot_be_within_the_budget_says_why(stages, reason):
    with pytest.raises(Infeasible, match=reason):
        fit(*stages)


def test_pipelines_of_files_are_brought_to_the_budget():
    fitter = Fitter(SHAPE, read({**LEAST, "strategies": ["divprune"]}).budget)
    one, two = (fitter.of(prunekit.load(name)) for name in ("fastv-k2-r11", "fastv-k2-r25"))
    assert one.sha == two.sha != fitter.of(prunekit.load("fastv-k2-r25-renumbered")).sha
    assert one.budget is not None and one.budget.fraction == 0.4
    assert len(fitter.of(prunekit.load("pyramiddrop")).bind(SHAPE).cuts) == 3
