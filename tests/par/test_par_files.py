"""Router folders: what is saved comes back, what does not belong is refused, and a router's content is in the hash."""

from __future__ import annotations

import json

import pytest
import torch
from prunekit_strategies.par import files
from prunekit_strategies.par.config import config_of
from prunekit_strategies.par.starting import random_router

import prunekit
from prunekit.families import shape_of
from prunekit.testing.tiny import tiny_inputs, tiny_llava


@pytest.fixture
def model():
    return tiny_llava()


def saved(folder, model, seed=0, **options):
    shape = shape_of(model)
    router = random_router(config_of(shape, **{"width": 32, **options}), seed)
    files.save(router, folder, files.numbers_of(shape, "tiny"), {"steps": 0}, "# A router\n")
    return router


def pipeline(folder, **keys):
    return prunekit.load({"name": "p", "stages": [{"use": "par", "weights": str(folder), "keep": 0.25, **keys}]})


def test_a_router_comes_back_as_it_was(tmp_path, model):
    router = saved(tmp_path / "r", model, depth=2, attention="causal")
    again = files.load(files.find(str(tmp_path / "r")))
    assert again.config == router.config
    for name, value in router.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == sorted([files.CARD, files.CONFIG, files.WEIGHTS])


def test_a_file_does_what_the_untrained_router_that_it_was_saved_from_does(tmp_path, model):
    saved(tmp_path / "r", model, seed=3)
    untrained = {"name": "p", "stages": [{"use": "par", "weights": None, "seed": 3, "width": 32, "keep": 0.25}]}
    reports = []
    for source in (pipeline(tmp_path / "r"), untrained):
        with prunekit.apply(model, source) as run:
            model(**tiny_inputs(images=(1, 2), text=(8, 5)))
        reports.append(run.report)
    assert reports[0].events[0].kept == reports[1].events[0].kept
    assert reports[0].notes == () and reports[1].notes != ()


def test_the_content_of_the_file_is_in_the_hash_and_is_read_anew(tmp_path, model):
    saved(tmp_path / "r", model, seed=0)
    first = pipeline(tmp_path / "r")
    assert first.sha == pipeline(tmp_path / "r").sha
    with prunekit.apply(model, first) as run:
        model(**tiny_inputs())
    saved(tmp_path / "r", model, seed=1)
    second = pipeline(tmp_path / "r")
    assert first.sha != second.sha
    with prunekit.apply(model, second) as again:
        model(**tiny_inputs())
    assert run.report.events[0].kept != again.report.events[0].kept


def test_a_router_of_another_model_is_refused(tmp_path, model):
    saved(tmp_path / "r", model)
    other = tiny_llava(layers=8)
    with pytest.raises(prunekit.SpecError, match=r"weights: .* made for another model \(tiny\): layers 6, not 8"):
        pipeline(tmp_path / "r").bind(shape_of(other))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"depth": 2}, "depth: the router in .* has 1; leave it out"),
        ({"attention": "causal"}, "attention: the router in .* has bidirectional"),
        ({"width": "model", "heads": 1}, None),
        ({"width": 64}, "width: the router in .* has 32"),
    ],
)
def test_options_that_contradict_the_file(tmp_path, model, keys, message):
    saved(tmp_path / "r", model)  # as wide as the tiny model, so `model` is right
    if message is None:
        keys = {"width": "model"}
        pipeline(tmp_path / "r", **keys).bind(shape_of(model))
        return
    with pytest.raises(prunekit.SpecError, match=message):
        pipeline(tmp_path / "r", **keys).bind(shape_of(model))


def test_a_folder_that_is_not_complete(tmp_path, model):
    saved(tmp_path / "r", model)
    (tmp_path / "r" / "router.safetensors").unlink()
    with pytest.raises(prunekit.SpecError, match=r"weights: '.*' is no router folder: it has no router.safetensors"):
        pipeline(tmp_path / "r")
    (tmp_path / "empty").mkdir()
    with pytest.raises(prunekit.SpecError, match=r"it has no config\.json"):
        pipeline(tmp_path / "empty")


def test_a_config_of_something_else(tmp_path, model):
    saved(tmp_path / "r", model)
    config = tmp_path / "r" / "config.json"
    good = json.loads(config.read_text())
    for text, message in (
        ("{", "is not the config of a router"),
        ("[]", "is not the config of a router"),
        ("{}", "there is no 'format'"),
        (json.dumps({**good, "format": "llama"}), "its format is 'llama'"),
        (json.dumps({**good, "version": 99}), "needs a newer prunekit"),
        (json.dumps({**good, "architecture": {**good["architecture"], "depth": 0}}), "depth: must be"),
        (json.dumps({**good, "architecture": {}}), "missing"),
    ):
        config.write_text(text)
        with pytest.raises(prunekit.SpecError, match=message):
            pipeline(tmp_path / "r").bind(shape_of(model))


def test_weights_that_are_not_those_of_the_config(tmp_path, model):
    saved(tmp_path / "r", model)
    for content in (b"", b"not a safetensors file"):
        (tmp_path / "r" / "router.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match="does not hold this router"):
            files.load(tmp_path / "r")
