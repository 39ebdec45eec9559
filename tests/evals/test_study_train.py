"""The routers of the study's ablations: each by its command, and only those that are missing."""

import itertools
import json

import pytest
from prunekit_evals.studies.par import __main__ as study
from prunekit_evals.studies.par import train

from prunekit.cli.main import main as prunekit


@pytest.mark.parametrize("name", train.OPTIONS)
def test_its_pipeline_fits_the_bundled_model(name, capsys):
    command = train.command(name, "unused", 40)
    changes = [part for flag, part in itertools.pairwise(command) if flag == "--set"]
    assert prunekit(["show", command[1], "--model", "micro", "--json", *(f"--set={one}" for one in changes)]) == 0
    stage = json.loads(capsys.readouterr().out)["stages"][0]
    assert stage["use"] == "par"


def test_those_that_are_there_are_not_trained_again(tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(train, "prunekit", lambda command: asked.append(command) or 0)
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "config.json").touch()
    assert train.main(["plain", "dpo", "--routers", str(tmp_path), "--steps", "7"]) == 0
    assert len(asked) == 1
    assert "loss=dpo" in asked[0] and "steps=7" in asked[0]
    assert "plain is there" in capsys.readouterr().out


def test_a_name_that_is_none_is_refused():
    with pytest.raises(SystemExit):
        train.main(["plane"])


def test_the_study_trains_them_first_and_stops_where_that_fails(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(study.train, "prunekit", lambda command: asked.append(command) or 3)
    assert study.main(["--parts", "par-micro-routers", "--routers", str(tmp_path)]) == 3
    assert len(asked) == 1
