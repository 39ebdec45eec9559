"""`prunekit doctor`: what it says of models that it takes, and of those that it does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, PretrainedConfig

from prunekit.cli import main
from prunekit.cli.doctor import examine, lines
from prunekit.testing.tiny_configs import CONFIGS
from prunekit.testing.tiny_families import tiny_model, tiny_names
from prunekit.verify import proof
from prunekit.verify.proof import Case, Observed, Proof


def folder(config: PretrainedConfig, path: Path) -> Path:
    """A model folder that holds a config alone."""
    config.save_pretrained(path)
    return path


def test_a_folder_with_a_config_is_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder(CONFIGS["qwen3_vl"](8), tmp_path)
    assert main.main(["doctor", str(path), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["ok"] and data["refused"] is None and data["model"] == str(path)
    assert data["family"] == "qwen_vl" and data["family_file"]
    assert data["decoder"]["layers"] == 8 and data["decoder"]["logical_until"] == 2
    assert [one["name"] for one in data["visual_inputs"]] == ["image", "video"]
    assert len(data["proof"]) == 7 and all(case["error"] < 1e-9 for case in data["proof"])


def test_the_text_says_what_is_special(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder(CONFIGS["cohere2_vision"](6), tmp_path)
    assert main.main(["doctor", str(path), "--no-proof"]) == 0
    said = capsys.readouterr().out
    assert "self_attn, mlp\n" in said
    assert "sliding_attention in 3 layers, full_attention in 3 layers" in said
    assert "unsupported sites N.mid: attention and MLP run side by side" in said
    assert said.endswith("verdict     recognised; the proof was not run\n")


def test_the_tower_says_what_can_leave_before_it() -> None:
    def tower(family: str) -> str:
        data = examine(tiny_model(family, dtype=torch.float32).to("meta"), proof=False)
        return next(line for line in lines({"model": "m", **data}) if line.startswith("tower"))

    assert tower("llava").endswith("token by token; whole images")
    assert tower("gemma3").endswith("in full also behind a cut; whole images")
    assert tower("qwen2_vl").endswith("token by token; images of any size, whose patches may leave before")


@pytest.mark.parametrize("kind", ["mllama", "blip-2"])
def test_a_model_that_is_refused(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder(AutoConfig.for_model(kind), tmp_path)
    assert main.main(["doctor", str(path)]) == 1
    said = capsys.readouterr().out
    assert f"verdict     refused: models of type '{kind}' " in said


def test_a_model_of_an_unknown_family_is_proved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = AutoConfig.for_model("lighton_ocr")
    assert main.main(["doctor", str(folder(config, tmp_path))]) == 0
    said = capsys.readouterr().out
    assert "generic:lighton_ocr, recognised without a family file" in said
    assert "coords, frames" not in said and "videos: its twin runs on no prompt with one" in said
    assert said.endswith("verdict     pruned exactly\n")


def test_a_proof_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = Proof(Observed(), (Case("nothing pruned", 0.0), Case("layers skipped", None, "logits differ")))
    monkeypatch.setattr(proof, "prove", lambda config: failed)
    data = examine(tiny_model("llava", dtype=torch.float32))
    assert not data["ok"]
    said = list(lines({"model": "m", **data}))
    assert said[-2:] == [
        "            layers skipped: FAILED: logits differ",
        "verdict     refused: the proof does not hold",
    ]


def test_videos_behind_the_id_of_images_are_proved() -> None:
    """That both share an id stands in the family's file, and prompts of the twin follow it."""
    data = examine(tiny_model("glm4v", dtype=torch.float32).to("meta"))
    assert data["ok"], data


@pytest.mark.parametrize("family", tiny_names())
def test_every_family_is_recognised(family: str) -> None:
    data = examine(tiny_model(family, dtype=torch.float32).to("meta"), proof=False)
    assert data["ok"] and data["type"] == family and data["family_file"]
    assert sum(data["caches"].values()) == data["decoder"]["layers"] == 6
    json.dumps(data)


def test_a_model_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["doctor", "no/such/folder"]) == 2
    assert "no such model folder" in capsys.readouterr().err
