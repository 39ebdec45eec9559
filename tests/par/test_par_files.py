"""Router folders: what is saved comes back, what does not belong is refused, and a router's content is in the hash."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from prunekit_strategies.par import files
from prunekit_strategies.par.config import config_of
from prunekit_strategies.par.starting import random_router
from safetensors.torch import load_file, save_file

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
        (json.dumps({**good, "architecture": {}}), "its architecture lacks 'hidden'"),
    ):
        config.write_text(text)
        with pytest.raises(prunekit.SpecError, match=message):
            pipeline(tmp_path / "r").bind(shape_of(model))


def test_a_config_that_was_edited(tmp_path, model):
    """Each error names the file, what is wrong in it, and what to do."""
    saved(tmp_path / "r", model)
    config = tmp_path / "r" / "config.json"
    good = json.loads(config.read_text())
    parts = good["architecture"]
    for change, message in (
        ({"model": []}, r"its model is \[\]"), ({"training": None}, "its training is None"),
        ({"version": "1"}, "its version is '1'"), ({"architecture": {**parts, "eps": "x"}}, "its eps is 'x'"),
        ({"architecture": {**parts, "bias": 1}}, "its bias is 1"), ({"architecture": [1]}, "its architecture is"),
        ({"architecture": {k: v for k, v in parts.items() if k != "mlp"}}, "its architecture lacks 'mlp'"),
        ({"architecture": {**parts, "more": 1}}, "its architecture has an unknown 'more'"),
    ):  # fmt: skip
        config.write_text(json.dumps({**good, **change}))
        with pytest.raises(
            prunekit.SpecError, match=rf"weights: '.*config\.json' .*{message}.*; copy .* or train anew"
        ):
            pipeline(tmp_path / "r").bind(shape_of(model))


def shortened(path):
    path.write_bytes(path.read_bytes()[:-9])


def edited(change):
    def edit(path):
        save_file(change(load_file(path)), path)

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(b""), "header too small"),
        (lambda path: path.write_bytes(b"\x80\x04 not safetensors, a pickle"), "header too large"),
        (shortened, "not fully covered"),
        (edited(lambda t: {k: v for k, v in t.items() if k != "score.weight"}), "it lacks 'score.weight'"),
        (edited(lambda t: {**t, "extra": torch.zeros(1)}), "'extra' is none of its parts"),
        (edited(lambda t: {**t, "layer_tokens": torch.zeros(7, 32)}), r"'layer_tokens' has the shape \(7, 32\), not"),
        (edited(lambda t: {k: v.int() for k, v in t.items()}), "'blocks.0.down.weight' holds no fractions"),
    ],
    ids=["empty", "pickle", "shortened", "missing", "extra", "shape", "dtype"],
)
def test_weights_that_are_not_those_of_the_config(tmp_path, model, damage, message):
    """Known before the model runs, without reading the numbers; `files.load` says the same."""
    saved(tmp_path / "r", model)
    damage(tmp_path / "r" / "router.safetensors")
    said = rf"'.*router\.safetensors' does not hold this router: .*{message}.*; copy .* or train anew"
    with pytest.raises(prunekit.SpecError, match="weights: " + said):
        pipeline(tmp_path / "r").bind(shape_of(model))
    with pytest.raises(ValueError, match=said):
        files.load(tmp_path / "r")


def test_weights_that_are_no_numbers(tmp_path, model):
    """Scores of NaN would rank by chance, and nobody would know; in another precision they are as good as ever."""
    saved(tmp_path / "r", model)
    edited(lambda t: {name: value.half() for name, value in t.items()})(tmp_path / "r" / "router.safetensors")
    with prunekit.apply(model, pipeline(tmp_path / "r")):
        model(**tiny_inputs())
    edited(lambda t: {**t, "score.weight": t["score.weight"] * torch.nan})(tmp_path / "r" / "router.safetensors")
    broken = pipeline(tmp_path / "r")
    with pytest.raises(prunekit.Unsupported, match=r"weights: .*'score\.weight' holds numbers that are not finite"):
        broken.stages[0].strategy.learner(shape_of(model), [], 10000.0)
    with pytest.raises(prunekit.Unsupported, match="not finite"), prunekit.apply(model, broken):
        model(**tiny_inputs())


def test_names_that_lead_nowhere_say_what_to_do(tmp_path, model):
    with pytest.raises(prunekit.SpecError, match=r"there is no router 'org/none': .* train one with `prunekit train`"):
        pipeline("org/none")
    saved(tmp_path / "r", model)
    with pytest.raises(prunekit.SpecError, match="family llava, not qwen2_vl; train one for this model"):
        pipeline(tmp_path / "r").bind(dataclasses.replace(shape_of(model), family="qwen2_vl"))
