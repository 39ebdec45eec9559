"""What a serving engine could do with each stage, and that the reason is the true one."""

from __future__ import annotations

import json
from typing import Any

import pytest

from prunekit import families
from prunekit.cli import main
from prunekit.pipeline.build import build
from prunekit.serving import of_stage
from prunekit.testing.tiny import tiny_llava


@pytest.mark.parametrize(
    ("stage", "way", "why"),
    [
        ({"use": "divprune", "keep": 0.5}, "image_embeds", "numbers them without gaps"),
        ({"use": "fastervlm", "keep": 0.5}, "image_embeds", "gaps"),
        ({"use": "pool", "keep": 0.25}, "image_embeds", "gaps"),
        ({"use": "blind"}, "image_embeds", "gaps"),
        ({"use": "prumerge"}, "no", "depends on what the image shows"),
        ({"use": "mmtok", "keep": 0.5}, "no", "may see the question"),
        ({"use": "fastv", "at": 2, "keep": 0.5}, "no", "inside the decoder, at 2"),
        ({"use": "downsample"}, "images", "counts their tokens"),
        ({"use": "skip_layers", "layers": [2]}, "checkpoint", ""),
        ({"use": "skip_layers", "layers": [2], "phase": "prefill", "fill_kv": True}, "no", "layers 2 do not simply"),
        ({"use": "freeze_layers", "layers": [2]}, "no", "layers 2 do not"),
        ({"use": "par", "weights": None, "seed": 0, "keep_layers": 3}, "no", "about layers as well, by the question"),
        ({"use": "dense"}, "nothing", ""),
    ],
)
def test_a_stage(stage: dict[str, Any], way: str, why: str) -> None:
    bound = build({"name": "x", "stages": [stage]}).bind(families.shape_of(tiny_llava()))
    told = of_stage(bound.stages[0], bound)
    assert (told.way, why in told.why) == (way, True), told
    assert bool(told.why) == bool(why)


def test_renumbered_positions_are_those_of_an_engine() -> None:
    spec = {"name": "x", "positions": "renumber", "stages": [{"use": "divprune", "keep": 0.5}]}
    bound = build(spec).bind(families.shape_of(tiny_llava()))
    assert of_stage(bound.stages[0], bound).why == ""


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["doctor", "micro", "--serving", "compose", "--serving", "skip-two"]
    assert main.main(asked) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "compose" and lines[2].startswith("  stages[1] fastv: no: ") and lines[4] == "skip-two"
    assert main.main([*asked, "--json"]) == 0
    stages = json.loads(capsys.readouterr().out)["compose"]
    assert [one["way"] for one in stages] == ["image_embeds", "no", "checkpoint"]
    assert main.main(["doctor", "micro", "--serving", "nothing-of-the-kind"]) == 2
