"""Budgets of risk that are wrong, and calibrations that do not fit."""

from __future__ import annotations

import dataclasses
import json
import re

import artefacts
import pytest
from artefacts import FASTV, LADDER, PAR

import prunekit
from prunekit import Unsupported
from prunekit.errors import SpecError
from prunekit.testing.tiny import tiny_llava

TEXT = "budget: {%s}\nstages: [{use: fastv%s}]\n"


@pytest.mark.parametrize(
    ("budget", "stage", "said"),
    [
        ("risk: 2", "", "<inline>:1:16: budget.risk: must be a share between 0 and 1, not 2 (for per cent divide by"),
        ("risk: low", "", "budget.risk: must be a share between 0 and 1, not 'low'"),
        ("risk: 0.1, confidence: 1", "", "budget.confidence: must be a share between 0 and 1, not 1"),
        ("risk: 0.1, flops: 0.4", "", "budget.flops: unknown key (known keys of a budget of risk: risk, confidence"),
        ("risk: 0.1, calibration: 3", "", "budget.calibration: must be a path, not 3"),
        ("risk: 0.1, ladder: []", "", "budget.ladder: is empty (such as [{keep: 0.5}"),
        ("risk: 0.1, ladder: 0.5", "", "budget.ladder: must be a list of mappings, not 0.5"),
        ("risk: 0.1, ladder: [0.5]", "", "budget.ladder[0]: must be a mapping that says what is kept, not 0.5"),
        ("risk: 0.1, ladder: [{kept: 0.5}]", "", "budget.ladder[0].kept: unknown key (did you mean 'keep'?"),
        ("risk: 0.1, ladder: [{keep: 25}]", "", "budget.ladder[0].keep: must be a fraction in (0, 1], not 25"),
        ("risk: 0.1, ladder: [{keep: 0.5}, {keep: 0.6}]", "", "budget.ladder[1]: keeps more than the rung before"),
        ("risk: 0.1, ladder: [{keep: 0.5}, {keep: 0.5}]", "", "budget.ladder[1]: keeps as much as the rung before"),
        ("risk: 0.1, ladder: [{keep: 0.5}, {keep_tokens: 9}]", "", "budget.ladder[1]: says otherwise than the rung"),
        ("risk: 0.1, ladder: [{keep_layers: 4}]", "", "budget.ladder[0].keep_layers: 'fastv' does not decide about"),
        ("risk: 0.1, ladder: [{keep: [0.5, 0.4]}]", "", "budget.ladder[0]: names 2 amounts, and the stage 1 sites"),
        ("risk: 0.1", ", keep: 0.5", "stages[0].keep: 'fastv' says itself how much it keeps (remove it"),
        ("risk: 0.1", "}, {use: random", "budget: is for a pipeline of one stage, and this one has 2 (another stage"),
    ],
)
def test_budgets_that_cannot_be_read(budget, stage, said):
    with pytest.raises(SpecError, match=re.escape(said)):
        prunekit.load(TEXT % (budget, stage))


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ({"use": "divprune"}, "stages[0].use: 'divprune' decides without scores"),
        ({"use": "vtw", "at": 2}, "stages[0].use: 'vtw' takes no `keep` that a ladder could set"),
        ({"use": "skip_layers", "layers": [2]}, "stages[0].use: 'skip_layers' takes no `keep`"),
        ({**PAR, "keep_layers": 5}, "stages[0].keep_layers: 'par' says itself how much it keeps"),
    ],
)
def test_stages_that_cannot_take_part(stage, said):
    with pytest.raises(SpecError, match=re.escape(said)):
        artefacts.pipeline(stage, LADDER)


@pytest.mark.parametrize(
    ("stage", "ladder", "said"),
    [
        (PAR, [{"keep_layers": 9}], "budget.ladder[0]: asks for 9 layers, but the model has 6"),
        (PAR, [{"keep": 0.5}, {"keep_layers": 2}], "budget.ladder[1]: leaves 2 layers, but"),
        ({**FASTV, "at": 40}, LADDER, "the model has layers 0 to 5"),
    ],
)
def test_ladders_that_do_not_fit_the_model(shape, stage, ladder, said):
    with pytest.raises(SpecError, match=re.escape(said)):
        artefacts.pipeline(stage, ladder).bind(shape)


def test_without_a_calibration_the_command_is_told(shape):
    command = "prunekit calibrate <dict> --model MODEL --data DATA --prompts N --out risk.json, with N at least 2"
    with pytest.raises(SpecError, match=re.escape(f"is missing: the risk has to be measured; make it: {command}")):
        artefacts.pipeline(FASTV, LADDER, risk=0.3).bind(shape)


def test_calibrations_that_do_not_fit(tmp_path, shape):
    path = tmp_path / "risk.json"
    made = artefacts.pipeline(FASTV, LADDER, calibration=str(path))

    def refused(said):
        with pytest.raises(SpecError, match=said) as caught:
            artefacts.pipeline(FASTV, LADDER, calibration=str(path)).bind(shape)
        assert caught.value.faults[0].key == "budget.calibration" and f"--out {path}" in caught.value.faults[0].hint

    refused("cannot read '.*risk.json'")
    whole = artefacts.artefact(made, shape, [0.5] * 20)
    for changes, said in [
        ({"strategy": "vtw"}, "is a calibration of 'vtw'"),
        ({"model": {**whole.model, "layers": 32}}, "does not fit: it is of a model with family llava, layers 32"),
        ({"result": {**whole.result, "pipeline": "feed"}}, "is of another pipeline, feed; this one, without its risk"),
    ]:
        dataclasses.replace(whole, **changes).write(path)
        refused(said)
    whole.write(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), "prunekit": "9"}))
    refused("was changed since it was written")


def test_what_a_calibration_belongs_to(tmp_path, shape):
    """The strategy with its options and the ladder; not the risk, which may change without another calibration."""
    first = artefacts.pipeline(FASTV, LADDER)
    same = artefacts.pipeline(FASTV, LADDER, risk=0.1, confidence=0.8)
    assert first.base == same.base and first.sha != same.sha
    others = [({**FASTV, "at": 3}, LADDER), ({**FASTV, "rope": False}, LADDER), (FASTV, LADDER[:2]), (PAR, LADDER)]
    assert len({first.base, *(artefacts.pipeline(*other).base for other in others)}) == 5
    path = tmp_path / "risk.json"
    artefacts.artefact(first, shape, [0.1, 0.2, 0.3, 0.4] * 5).write(path)
    told = [artefacts.pipeline(FASTV, LADDER, risk=share, calibration=str(path)) for share in (0.2, 0.4, 0.7)]
    assert [one.bind(shape).ladder.threshold for one in told] == [0.1, 0.2, 0.3]
    again = prunekit.load(told[0].resolved)
    assert again.sha == told[0].sha
    before = told[0].sha
    artefacts.artefact(first, shape, [0.1] * 20).write(path)
    assert artefacts.pipeline(FASTV, LADDER, risk=0.2, calibration=str(path)).sha != before


def test_other_weights_and_dtypes(tmp_path, model, shape, monkeypatch):
    pipeline = artefacts.calibrated(tmp_path, FASTV, LADDER, shape, 0.5)
    said = "the risk of 'risky' was calibrated on model 0123456789ab in float64; this is model {} in {} "
    hint = r"\(load that one, or calibrate on this with"
    with prunekit.apply(model, pipeline):
        pass
    with (
        pytest.raises(Unsupported, match=said.format("0123456789ab", "float32") + hint),
        prunekit.apply(tiny_llava().float(), pipeline),
    ):
        pass
    monkeypatch.setattr("prunekit.engine.calibrated.identity_of", lambda model: "feedfeedfeed")
    with pytest.raises(Unsupported, match=said.format("feedfeedfeed", "float64") + hint), prunekit.apply(
        model, pipeline
    ):
        pass
