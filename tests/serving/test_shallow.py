"""Checkpoints without layers: they answer as the pipeline does, on every family, also read back from disk."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_checkpoint import save
from torch import nn

import prunekit
from prunekit.cli import main
from prunekit.errors import InputError, Unsupported
from prunekit.serving import shallow
from prunekit.testing.tiny import tiny_inputs, tiny_llava
from prunekit.testing.tiny_families import tiny_batch, tiny_model, tiny_names

SKIP = {"name": "skip", "stages": [{"use": "skip_layers", "layers": [1, 2]}]}
LATER = ("qwen3_vl", "qwen3_vl_moe")  # between their first layers features are added
REFUSED = ("gemma3n", "gemma4", "gemma4_unified")  # with inputs of each layer's own, and keys handed on by number


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("name", tiny_names())
def test_it_answers_as_the_pipeline_does(name: str) -> None:
    model = tiny_model(name)
    inputs = dict(tiny_batch(model))
    layers = [0] if name in REFUSED else [3, 4] if name in LATER else [1, 2]
    pipeline = {"name": "skip", "stages": [{"use": "skip_layers", "layers": layers}]}
    before = model.state_dict()
    if name in REFUSED:
        with pytest.raises(Unsupported, match="with fewer layers cannot be made from its config"):
            shallow(model, pipeline, inputs)
        return
    made = shallow(model, pipeline, inputs)
    assert made.error < 1e-12 and made.layers - len(made.kept) == len(layers)
    now = model.state_dict()
    assert before.keys() == now.keys() and all(torch.equal(weight, now[key]) for key, weight in before.items())
    with torch.inference_mode():
        whole = model(**inputs).logits
        assert (made.model(**inputs).logits - whole).abs().max() > 1e-9  # it is another model than the whole one
        with prunekit.apply(model, pipeline):
            theirs = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        ours = made.model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert torch.equal(ours, theirs)


def test_the_command_writes_what_loads_and_answers_alike(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "shallow"
    path = tmp_path / "skip.yaml"
    path.write_text(json.dumps(SKIP))
    assert main.main(["export", str(path), "--model", str(folder), "--out", str(out)]) == 0
    assert f"wrote {out}: 8 of 10 layers, logits as the pipeline's to " in capsys.readouterr().out
    assert not [one for one in out.rglob("*") if one.suffix in (".bin", ".pt", ".pkl")]
    record = json.loads((out / "prunekit.json").read_text())
    assert record["kept"] == [0, *range(3, 10)] and record["layers"] == 10
    assert prunekit.load(record["resolved"]).sha == record["sha"]
    small: Any = transformers.AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32)
    whole: Any = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    inputs = tiny_inputs()
    with torch.inference_mode():
        with prunekit.apply(whole, SKIP):
            expected = whole(**inputs).logits
        assert (small(**inputs).logits - expected).abs().max() < 1e-5
    with prunekit.apply(small, "fastv-k2-r25", ["stages.0.at=1"]) as run, torch.inference_mode():  # and it is pruned
        small(**inputs)
    assert run.report is not None and run.report.kept_tokens[0] < run.report.visual_tokens[0]
    assert main.main(["export", str(path), "--model", str(folder), "--out", str(out)]) == 2
    assert "is there and not empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stages", "reason"),
    [
        ([{"use": "random", "keep": 0.5}, SKIP["stages"][0]], "a checkpoint can leave out layers alone"),
        ([{"use": "par", "weights": None, "seed": 0, "keep_layers": 3}], "can leave out layers alone"),
        ([{"use": "freeze_layers", "layers": [2]}], "a checkpoint can leave out whole layers alone"),
        ([{"use": "skip_layers", "layers": [2], "phase": "prefill", "fill_kv": True}], "whole layers alone"),
        ([{"use": "dense"}], "the pipeline leaves out no layer, so its checkpoint is the model itself"),
    ],
)
def test_other_pipelines_are_refused_with_the_reason(stages: list[dict[str, Any]], reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        shallow(tiny_llava(), {"name": "x", "stages": stages}, tiny_inputs())


def test_features_that_are_added_between_layers_stay_where_they_are() -> None:
    model = tiny_model("qwen3_vl")
    pipeline = {"name": "skip", "stages": [{"use": "skip_layers", "layers": [1]}]}
    with pytest.raises(Unsupported, match="adds features to hidden states behind its first 2 layers"):
        shallow(model, pipeline, dict(tiny_batch(model)))


def test_a_model_of_which_fewer_layers_are_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llava()
    usual = type(model).__init__

    def wider(self: Any, config: Any) -> None:
        config.text_config.intermediate_size *= 2
        usual(self, config)

    monkeypatch.setattr(type(model), "__init__", wider)
    with pytest.raises(Unsupported, match="with fewer layers cannot be made from its config"):
        shallow(model, SKIP, tiny_inputs())


def test_a_buffer_that_only_fewer_layers_have_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llava()
    usual = type(model).__init__

    def with_table(self: Any, config: Any) -> None:
        usual(self, config)
        self.register_buffer("table", torch.zeros(1), persistent=False)

    monkeypatch.setattr(type(model), "__init__", with_table)
    with pytest.raises(Unsupported, match="with fewer layers has 'table', which the model has not"):
        shallow(model, SKIP, tiny_inputs())


def test_a_model_that_answers_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llava()
    usual = nn.Module.load_state_dict

    def shifted(self: nn.Module, state: Any, **rest: Any) -> Any:
        return usual(self, {name: weight * 1.01 for name, weight in state.items()}, **rest)

    monkeypatch.setattr(nn.Module, "load_state_dict", shifted)
    with pytest.raises(Unsupported, match=re.escape("does not answer as the pipeline does (logits differ by")):
        shallow(model, SKIP, tiny_inputs())


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    made = shallow(tiny_llava(), SKIP, tiny_inputs())
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="name another folder"):
        made.save(tmp_path / "file", None)
