"""`prunekit calibrate` of a budget of risk: what it writes, by hand, and that its file is then taken."""

from __future__ import annotations

import json
import math

import pytest
import tiny_checkpoint

import prunekit
from prunekit import loading, read_artefact
from prunekit.cli import main
from prunekit.pipeline import risk
from prunekit.training.data import encode, source
from prunekit.training.risk import Climbed

FILE = """name: risky
budget: {risk: 0.4, confidence: 0.7, ladder: [{keep: 0.75}, {keep: 0.25, keep_layers: 5}]}
stages: [{use: par, weights: null, seed: 0, width: 16, at: 2}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("risk")
    tiny_checkpoint.save(folder / "tiny", 6)
    lines = []
    for number in range(8):
        tiny_checkpoint.picture(folder / f"{number}.png", number)
        lines.append(json.dumps({"image": f"{number}.png", "prompt": f"w{20 + number} w{30 + number}"}))
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    (folder / "risky.yaml").write_text(FILE)
    return folder


def command(folder, prompts=8):
    named = ["--model", str(folder / "tiny"), "--data", str(folder / "prompts.jsonl"), "--prompts", str(prompts)]
    out = ["--out", str(folder / "risk.json"), "--max-new-tokens", "2"]
    return ["calibrate", str(folder / "risky.yaml"), *named, *out]


def answer(model, inputs, pipeline=None):
    if pipeline is None:
        return model.generate(**inputs, max_new_tokens=2, do_sample=False)[0].tolist()
    with prunekit.apply(model, pipeline):
        return model.generate(**inputs, max_new_tokens=2, do_sample=False)[0].tolist()


@pytest.mark.filterwarnings("ignore:.*no pruning is certified")
def test_the_command_writes_what_follows_by_hand(folder, capsys):
    assert main.main(command(folder)) == 0
    told = capsys.readouterr().out
    found = read_artefact(folder / "risk.json", risk.KIND)
    model, processor = loading.load(folder / "tiny")
    pipeline, data = prunekit.load(folder / "risky.yaml"), source(str(folder / "prompts.jsonl"))
    fixed = [{"use": "par", "weights": None, "seed": 0, "width": 16, "at": 2, **kept}
             for kept in ({"keep": 0.75}, {"keep": 0.25, "keep_layers": 5})]  # fmt: skip
    assert found.result["pipeline"] == pipeline.base and found.result["dtype"] == "float32"
    taken = prunekit.load(folder / "risky.yaml", overrides=[f"budget.calibration={folder / 'risk.json'}"])
    critical, agree = [], [0, 0]
    for index in range(len(data)):
        inputs = encode(processor, [data[index]])
        dense = answer(model, inputs)
        differs = [answer(model, inputs, {"stages": [stage]}) != dense for stage in fixed]
        with prunekit.apply(model, taken) as run:
            model(**inputs)
        (harms,), (rung,) = run.report.harms, run.report.rungs
        critical.append(next((harm for harm, wrong in zip(harms, differs, strict=True) if wrong), math.inf))
        agree = [count + (not wrong) for count, wrong in zip(agree, differs, strict=True)]
        assert rung == sum(harm < run.bound.ladder.threshold for harm in harms)
    assert risk.critical_of(found) == tuple(sorted(critical))
    assert found.result["agreement"] == [count / 8 for count in agree]
    assert f"keep 0.75: {agree[0] / 8:.1%} of the answers are those of the dense model" in told
    assert f"budget.calibration={folder / 'risk.json'}" in told


def test_too_few_prompts_are_refused_before_anything_runs(folder, capsys):
    assert main.main(command(folder, prompts=2)) == 2
    said = "2 prompts can certify no pruning at a risk of 0.4 with confidence 0.7 (ask for at least 3: --prompts)"
    assert said in capsys.readouterr().err
    assert main.main(command(folder, prompts=9)) == 2
    assert "has 8 prompts, not 9 (ask for fewer with --prompts)" in capsys.readouterr().err


# Whether this random model lets anything be certified is not what is tested.
@pytest.mark.filterwarnings("ignore:.*no pruning is certified")
def test_show_tells_the_rungs_and_a_range(folder, capsys):
    assert main.main(command(folder)) == 0
    capsys.readouterr()
    shown = [str(folder / "risky.yaml"), "--model", str(folder / "tiny"), f"budget.calibration={folder / 'risk.json'}"]
    assert main.main(["show", *shown]) == 0
    text = capsys.readouterr().out
    assert main.main(["show", *shown, "--json"]) == 0
    assert "rung 2: 0.25 of original, 5 of 6 layers" in text and " to 100.0% of dense" in text
    data = json.loads(capsys.readouterr().out)
    assert len(data["model"]["ladder"]["rungs"]) == 2 and data["model"]["tokens_at_most"] is True
    assert data["budget"]["calibration"] == str(folder / "risk.json")
    assert main.main(["cost", *shown, "--json"]) == 0
    (row,) = [row for row in json.loads(capsys.readouterr().out)["pipelines"] if row.get("cuts")]
    assert row["cuts"][0]["visual_tokens"] == [4, 16] and row["exact"] is False
    assert row["flops"]["prefill"][0] < row["flops"]["prefill"][1]
    assert main.main(["show", *shown[:3]]) == 2
    assert "make it: prunekit calibrate" in capsys.readouterr().err


def test_a_pipeline_that_is_never_dense_is_refused(folder, capsys, monkeypatch):
    """Its first rung keeps everything and answers otherwise all the same."""
    changed = Climbed((0.0, 0.5, 0.9), (7, 8), ((7, 9), (7, 8), (7, 8)), (1.0, 0.7, 0.4))
    monkeypatch.setattr("prunekit.training.risk.climb", lambda *_: iter([changed] * 8))
    assert main.main(command(folder)) == 2
    assert "with everything kept, 8 answers under 'risky' differ from the model's own" in capsys.readouterr().err
