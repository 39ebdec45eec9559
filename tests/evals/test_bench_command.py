"""`prunekit bench`: what it measures on a tiny model, what it concludes, and what it refuses. No figure is judged."""

from __future__ import annotations

import json

import pytest
import torch
from prunekit_evals.bench import breakeven, measure
from prunekit_evals.bench.measure import Point, Spread, Times

import prunekit
from prunekit import loading
from prunekit.cli import main
from prunekit.testing.tiny_families import tiny_model

POINT = Point(batch=2, image=(56, 56), images=1, text=12)
PIPELINES = {
    "fastv": {"stages": [{"use": "fastv", "at": 2, "keep": 0.25}]},
    "skip": {"stages": [{"use": "skip_layers", "layers": [2, 3]}]},
    "adaptive": {"stages": [{"use": "prumerge"}]},
}


def processor_of(model):
    side = model.config.vision_config.image_size
    return lambda images, **_: {"pixel_values": torch.ones(len(images), 3, side, side)}


@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_what_is_measured(name):
    model = tiny_model(name, dtype=torch.float32)
    inputs = measure.inputs_of(model, processor_of(model), POINT)
    assert inputs.ids.shape == (2, 12 + inputs.visual)
    chosen = {key: prunekit.load(value) for key, value in PIPELINES.items() if name == "llava" or key != "adaptive"}
    times = measure.measure(model, {"dense": None, **chosen}, inputs, rounds=2, seconds=0)
    for one in times.values():
        assert len(one.tower) == len(one.prefill) == len(one.step) == 2 and min(*one.tower, *one.step) > 0
        assert one.memory > sum(weight.numel() * 4 for weight in model.parameters())
    kept = round(0.25 * inputs.visual + 1e-9)
    assert times["fastv"].cuts == (("2", kept),) and times["skip"].cuts == () and times["dense"].flops == 1
    assert 0 < times["fastv"].flops < 1
    twin = measure.twin_of(times["fastv"])
    assert [cut.stage.use for cut in twin.bind(prunekit.families.shape_of(model)).cuts] == ["stride"]
    assert measure.twin_of(times["skip"]) is None


def test_a_whole_is_its_parts():
    one = Times(tower=[1.0, 2.0], prefill=[3.0, 4.0], step=[0.5, 0.25])
    assert one.first() == [4, 6] and one.whole(1) == [4, 6] and one.whole(5) == [6, 7]


@pytest.mark.parametrize(("own", "said"), [
    ([1.0, 1.1, 1.0], "pays"), ([2.0, 2.1, 1.9], "even"), ([4.0, 4.1, 3.9], "costs"), ([1.0, 4.0, 2.0], "even"),
])  # fmt: skip
def test_what_pays(own, said):
    """Rounds are compared with rounds: what meets both alike changes nothing."""
    dense = [2.0, 2.0, 2.0]
    assert measure.verdict(measure.speedup(own, dense)) == said
    slow = [1.0, 10.0, 3.0]
    found = measure.speedup([a * b for a, b in zip(own, slow, strict=True)], [2 * b for b in slow])
    assert found == pytest.approx(measure.speedup(own, dense)) or measure.verdict(found) == said


def rows():
    dense = Times(tower=[1.0] * 3, prefill=[3.0] * 3, step=[1.0] * 3, memory=2 * 10**9)
    pruned = Times(tower=[1.0] * 3, prefill=[1.0] * 3, step=[1.25] * 3, memory=10**9, flops=0.4, cuts=(("2", 9),))
    twin = Times(tower=[1.0] * 3, prefill=[0.75] * 3, step=[1.25] * 3)
    times = {"dense": dense, "fastv": pruned}
    return breakeven.rows_of(Point(4, (8, 8), 1, 12), 36, times, {"fastv": twin}, [1, 101])


def test_the_map_and_the_table_by_hand():
    dense, fastv = rows()
    assert fastv.first == Spread(2, 2, 2) and fastv.whole[101] == Spread(127, 127, 127)
    assert fastv.overhead == Spread(0.25, 0.25, 0.25) and dense.overhead is None
    assert {name: one.median for name, one in fastv.faster.items()} == {
        "1": 2, "101": pytest.approx(104 / 127), "first": 2,
    }  # fmt: skip
    shown = breakeven.break_even([dense, fastv]).splitlines()
    assert shown[0].split("|")[1:-1] == [" pipeline ", " batch ", " visual ", " first token ", " 1 new tokens ",
                                         " 101 new tokens "]  # fmt: skip
    assert shown[2].replace(" ", "") == "|fastv|4|36|2.00+|2.00+|0.82-|" and len(shown) == 3
    table = breakeven.table([dense, fastv], [1, 101]).splitlines()
    assert len(table) == 4 and "0.40" in table[3] and "250.0 (250.0-250.0)" in table[3]
    data = fastv.to_json()
    assert data["speedup"]["101"]["verdict"] == "costs" and data["seconds"]["first"]["median"] == 2


def test_the_chart():
    chart = breakeven.chart(rows()).to_dict()
    assert [one["pruning"] for one in chart["data"]["values"]] == ["pays", "costs", "pays"]


def test_random_weights_are_made_from_a_config():
    config = loading.load_config("micro")
    one, two = (measure.random_model(config, torch.device("cpu"), torch.float32, "eager") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert one.config._attn_implementation == "eager"
    assert all(torch.isfinite(buffer).all() for buffer in one.buffers() if buffer.is_floating_point())


def run(capsys, *arguments):
    try:
        code = main.main(["bench", *arguments])
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def test_the_command(capsys, monkeypatch):
    monkeypatch.setattr(measure, "STEPS", 1)
    code, out, _ = run(
        capsys, "fastv-k2-r25", "--model", "micro", "--random", "--image", "168x168", "--rounds", "1", "--json",
        "--new-tokens", "1,8",
    )  # fmt: skip
    data = json.loads(out)
    assert code == 0 and data["about"]["weights"] == "random" and data["about"]["model"] == "micro"
    dense, fastv = data["rows"]
    assert (dense["pipeline"], fastv["visual_tokens"]) == ("dense", 144)
    assert set(fastv["speedup"]) == {"1", "8", "first"} and fastv["selector_overhead_seconds"] is not None


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "the following arguments are required: pipeline"),
    (["nope"], "no such file: 'nope'"),
    (["dense", "--batch", "0"], "'0' is not a whole number of at least 1"),
    (["dense", "--batch", "1,,2"], "'' is not a whole number"),
    (["dense", "--image", "big"], "'big' is not a height and a width in pixels"),
    (["dense", "--text-tokens", "3"], "--text-tokens is at least 9"),
    (["dense", "--plot", "map.png"], "name a file that ends in .html or .json"),
    (["dense", "--model", "llava-1.5-7b"], "is a config without weights"),
    (["dense", "--model", "micro", "--random", "--dtype", "int8"], "unknown dtype 'int8'"),
    (["dense", "--model", "micro", "--random", "--device", "cuda:99"], "device 'cuda:99' cannot be used"),
    (["fastv-k2-r25", "--model", "micro", "stages.0.at=99"], "layers 0 to 7"),
])  # fmt: skip
def test_wrong_inputs(capsys, arguments, message):
    given = arguments if "--model" in arguments else [*arguments, "--model", "micro"]
    code, _, err = run(capsys, *given)
    assert code == 2 and message in err and "Traceback" not in err


def test_weights_that_do_not_fit(capsys, monkeypatch):
    monkeypatch.setattr("os.sysconf", lambda name: 4096 if name == "SC_PAGE_SIZE" else 1000)
    code, _, err = run(capsys, "dense", "--model", "llava-1.5-7b", "--random")
    assert code == 2 and "28.3 GB in torch.float32, and cpu has 0.0 GB free" in err
