"""Calibration: artefacts follow from what a frozen model does, and are refused where they do not fit."""

from __future__ import annotations

import dataclasses
import json
import re
import sys

import pytest
import torch

import prunekit
from prunekit import hookimpl, loading, plugins, read_artefact, strategy
from prunekit.cli import main
from prunekit.errors import InputError, PluginError, SpecError, Unsupported
from prunekit.pipeline.build import build
from prunekit.strategy.artefact import Artefact
from prunekit.training.calibrate import Prompt, calibrate, stage_of
from prunekit.training.data import source
from prunekit.verify.proof import proved_parts

SHORT = {"use": "shortgpt", "drop": 2}


@pytest.fixture(scope="module")
def micro():
    return loading.load("micro")


@pytest.fixture(scope="module")
def prompts(micro):
    data = source("micro-scenes")
    return [Prompt(*micro, proved_parts(micro[0]), data[index]) for index in range(3)]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Artefacts of both strategies on the bundled model, written by the command."""
    folder = tmp_path_factory.mktemp("artefacts")
    for name, pipeline in (("vtw", "vtw-half"), ("shortgpt", folder / "short.yaml")):
        (folder / "short.yaml").write_text("stages:\n  - {use: shortgpt, drop: 2}\n")
        arguments = ["calibrate", str(pipeline), "--model", "micro", "--data", "micro-scenes", "--prompts", "3"]
        assert main.main([*arguments, "--out", str(folder / f"{name}.json")]) == 0
    return folder


def test_prompts_show_what_the_dense_model_does(micro, prompts):
    model, _ = micro
    prompt = prompts[0]
    states = prompt.states()
    assert len(states) == len(proved_parts(model).layers) + 1
    assert all(one.shape == states[0].shape and len(one) == len(prompt.visual) for one in states)
    assert int(prompt.visual.sum()) == 144
    final = proved_parts(model).final_norm(states[-1][-1:])
    assert torch.allclose(model.lm_head(final)[0].float(), prompt.logits(), atol=1e-4)
    assert torch.equal(prompt.logits(), prompt.logits([{"use": "dense"}]))
    assert not torch.allclose(prompt.logits(), prompt.logits([{"use": "blind"}]), atol=1e-2)
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in proved_parts(model).layers)


def test_block_influence_by_hand(micro, prompts, written):
    result = read_artefact(written / "shortgpt.json", "shortgpt").result["influence"]
    data = source("micro-scenes")
    from prunekit.training.data import order

    drawn = [Prompt(*micro, proved_parts(micro[0]), data[index]) for index in order(len(data), 0, 3)]
    wanted, tokens = [0.0] * len(result), 0
    for prompt in drawn:
        states = prompt.states()
        tokens += len(states[0])
        for layer in range(len(result)):
            for one, other in zip(states[layer].double(), states[layer + 1].double(), strict=True):
                wanted[layer] += 1 - float(one @ other / (one.norm() * other.norm()))
    assert result == pytest.approx([total / tokens for total in wanted], abs=1e-9)


def test_shortgpt_leaves_out_the_least_influential_layers(micro, written):
    path = written / "shortgpt.json"
    influence = read_artefact(path, "shortgpt").result["influence"]
    least = sorted(sorted(range(len(influence)), key=lambda layer: influence[layer])[:2])
    shape = loading.load_shape("micro")
    bound = build({"stages": [{**SHORT, "calibration": str(path)}]}).bind(shape)
    assert {layer: action.value for layer, action in bound.plan} == dict.fromkeys(least, "skip")
    generating = build({"stages": [{**SHORT, "calibration": str(path), "phase": "prefill"}]}).bind(shape)
    assert {layer: action.value for layer, action in generating.plan} == dict.fromkeys(least, "fill_kv")
    assert {generating.plan.decoding(layer).value for layer in least} == {"run"}


def test_vtw_stands_where_the_divergence_allows(written):
    path = written / "vtw.json"
    divergence = read_artefact(path, "vtw").result["divergence"]
    assert list(map(int, divergence)) == list(range(1, 8)) and min(divergence.values()) >= 0
    for eta in sorted(divergence.values()):
        first = min(int(layer) for layer, value in divergence.items() if value <= eta)
        (cut,) = (
            build({"stages": [{"use": "vtw", "calibration": str(path), "eta": eta}]})
            .bind(loading.load_shape("micro"))
            .cuts
        )
        assert str(cut.site) == str(first)


def test_the_artefact_is_in_the_hash(written, tmp_path):
    path = tmp_path / "short.json"
    stage = {**SHORT, "calibration": str(path)}
    artefact = read_artefact(written / "shortgpt.json", "shortgpt")
    artefact.write(path)
    before = build({"stages": [stage]}).sha
    dataclasses.replace(artefact, data={**artefact.data, "prompts": 4}).write(path)
    assert build({"stages": [stage]}).sha != before


def test_the_same_calibration_twice_is_the_same(micro, written):
    stage = stage_of(build("vtw-half"), None)
    data = source("micro-scenes")
    again = calibrate(stage, *micro, data, 3, model_id=str(loading.model_identity(loading.resolve("micro"))),
                      name="micro-scenes")  # fmt: skip
    assert again.digest == read_artefact(written / "vtw.json", "vtw").digest


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (lambda text: "{", "is no calibration artefact: "),
            (lambda text: "[1]", "is no calibration artefact (write one with `prunekit calibrate`"),
            (lambda text: re.sub('"(vtw|shortgpt)"', '"fastv"', text), "is a calibration of 'fastv' (write one"),
            (lambda text: text.replace('"prompts": 3', '"prompts": 4'), "was changed since it was written: its"),
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("stage", [{"use": "vtw"}, SHORT], ids=["vtw", "shortgpt"])
    def test_files_that_are_no_artefact(self, written, tmp_path, stage, change, said):
        path = tmp_path / "bad.json"
        path.write_text(change((written / f"{stage['use']}.json").read_text()))
        with pytest.raises(SpecError) as caught:
            build({"stages": [{**stage, "calibration": str(path)}]})
        assert said in str(caught.value) and "stages[0].calibration" in str(caught.value)

    def test_a_missing_file(self, tmp_path):
        for stage in ({"use": "vtw"}, SHORT):
            with pytest.raises(SpecError, match=r"stages\[0\]\.calibration: cannot read '.*none\.json'.*calibrate`"):
                build({"stages": [{**stage, "calibration": str(tmp_path / "none.json")}]})

    def test_another_model(self, written):
        shape = loading.load_shape("micro")
        other = dataclasses.replace(shape, layers=12)
        said = f"of a model with family llava, layers {shape.layers}, hidden {shape.hidden}; this one has"
        for stage in ({"use": "vtw", "eta": 9.0}, SHORT):
            path = written / f"{stage['use']}.json"
            with pytest.raises(SpecError, match=said):
                build({"stages": [{**stage, "calibration": str(path)}]}).bind(other)

    def test_no_layer_is_good_enough(self, written):
        with pytest.raises(SpecError, match=r"stages\[0\]\.eta: no layer stays within 0; the least KL"):
            build({"stages": [{"use": "vtw", "calibration": str(written / "vtw.json"), "eta": 0}]})

    def test_shortgpt_without_a_calibration(self):
        with pytest.raises(SpecError, match=r"stages\[0\]\.calibration: is missing; `prunekit calibrate` writes one"):
            build({"stages": [SHORT]}).bind(loading.load_shape("micro"))

    def test_stages_that_cannot_be_calibrated(self):
        with pytest.raises(Unsupported, match="no stage of 'inline' can be calibrated: none of fastv implements the"):
            stage_of(build({"stages": [{"use": "fastv", "keep": 0.5}]}), None)
        both = build({"stages": [{"use": "vtw"}, SHORT]})
        with pytest.raises(InputError, match=r"several stages can be calibrated \(name one with --stage: 0 \(vtw\), 1"):
            stage_of(both, None)
        with pytest.raises(InputError, match="stage 7 of 'inline' cannot be calibrated"):
            stage_of(both, 7)
        assert stage_of(both, 1).use == "shortgpt"

    def test_more_prompts_than_there_are(self, micro):
        data = source("micro-scenes")
        with pytest.raises(InputError, match=r"has \d+ prompts, not"):
            calibrate(stage_of(build("vtw-half"), None), *micro, data, len(data) + 1, model_id="x", name="d")

    @pytest.mark.parametrize(
        ("result", "said"),
        [(3, "must return a dict, not int"), ({"a": float("nan")}, "must return finite numbers"),
         ({"a": torch.ones(1)}, "must return finite numbers, text, lists and dicts")],
    )  # fmt: skip
    def test_results_that_are_no_data(self, micro, result, said):
        @strategy(keep="refused")
        class Odd:
            @hookimpl
            def select_tokens(self, valid):
                return valid

            @hookimpl
            def calibrate(self):
                return result

        registry = prunekit.registry.Registry()
        sys.modules[__name__].__dict__["Odd"] = Odd
        registry.strategy("odd", f"{__name__}:Odd")
        stage = stage_of(build({"stages": [{"use": "odd"}]}, registry=registry), None)
        with pytest.raises(PluginError, match=said):
            calibrate(stage, *micro, source("micro-scenes"), 1, model_id="x", name="d")


def test_an_artefact_is_one_json_file(tmp_path):
    artefact = Artefact("0.1.0", "s", {"id": "m"}, {"name": "d"}, {"a": [1, 2.5]})
    artefact.write(tmp_path / "deep" / "a.json")
    assert read_artefact(tmp_path / "deep" / "a.json", "s") == artefact
    assert json.loads((tmp_path / "deep" / "a.json").read_text())["digest"] == artefact.digest
    assert list((tmp_path / "deep").iterdir()) == [tmp_path / "deep" / "a.json"]


def test_the_command_says_what_to_do_next(written, tmp_path, capsys):
    arguments = ["calibrate", "vtw-half", "--model", "micro", "--data", "micro-scenes", "--out", str(tmp_path)]
    assert main.main(arguments) == 2
    assert "is a folder (name a file, such as" in capsys.readouterr().err
    assert plugins.registry().strategy_entry("shortgpt").summary
