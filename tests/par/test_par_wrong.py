"""Wrong inputs to `prunekit train`: each ends with one line that says what, where and what next, and no router."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from prunekit.cli import main
from prunekit.errors import InputError
from prunekit.training.recipe import Recipe

sys.path.insert(0, str(Path(__file__).parent.parent))
from tiny_checkpoint import picture, save

ROUTER = {"use": "par", "weights": None, "seed": 0, "width": 16, "protect": [0]}
FAST = {"steps": 1, "batch": 4, "held_out": 4, "candidates": 2, "answer_tokens": 2}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, twelve prompts, a pipeline; and what is wrong with the others."""
    folder = tmp_path_factory.mktemp("wrong")
    save(folder / "tiny", layers=6)
    picture(folder / "a.png")
    (folder / "words.txt").write_text("no image")

    def prompts(name, **changes):
        line = json.dumps({"image": "a.png", "prompt": "w10 w11", **changes})
        (folder / name).write_text("\n".join([line] * 12))

    def pipeline(name, *stages, **keys):
        (folder / name).write_text(json.dumps({"stages": stages, **keys}))

    prompts("data.jsonl")
    prompts("not-an-image.jsonl", image="words.txt")
    prompts("gone.jsonl", image="b.png")
    prompts("placeholder.jsonl", prompt="what is <image> here")
    pipeline("par.json", {**ROUTER, "keep": 0.25, "keep_layers": 4})
    pipeline("two.json", {**ROUTER, "keep": 0.5}, {**ROUTER, "keep": 0.25})
    pipeline("none.json", {"use": "stride", "keep": 0.25})
    pipeline("open.json", ROUTER)
    pipeline("dear.json", {**ROUTER, "width": 512}, budget={"flops": 0.5})
    pipeline("layers.json", {**ROUTER, "keep": 0.5, "keep_layers": 9})
    pipeline("weights.json", {"use": "par", "weights": str(folder / "tiny"), "keep": 0.5})
    pipeline("learned.json", {"use": "fastv", "keep": 0.5}, {**ROUTER, "at": 3, "keep": 0.25})
    return folder


def train(place, out, pipeline="par.json", data="data.jsonl", model="tiny", **recipe):
    command = ["train", str(place / pipeline), "--model", str(place / model), "--data", str(place / data)]
    options = [f"--train={key}={value}" for key, value in {**FAST, **recipe}.items()]
    return main.main([*command, "--out", str(out), *options])


CASES = {
    "two routers": ({"pipeline": "two.json"}, ["one router", "has 2"]),
    "no router": ({"pipeline": "none.json"}, ["one router", "has 0"]),
    "no budget": ({"pipeline": "open.json"}, ["open.json:1:", "stages[0].keep", "is missing", "such as 0.25"]),
    "a budget below the router": (
        {"pipeline": "dear.json"},
        ["budget.flops", "cannot be reached", "to decide", "`width`"],
    ),
    "more layers than there are": ({"pipeline": "layers.json"}, ["keep_layers", "asks for 9", "at most 6"]),
    "weights that are none": (
        {"pipeline": "weights.json"},
        ["weights.json:1:", "weights", "router.safetensors", "train"],
    ),
    "no pipeline": ({"pipeline": "missing.json"}, ["no such file", "missing.json", "did you mean"]),
    "an unknown recipe key": ({"stepz": 3}, ["stepz: unknown key", "did you mean 'steps'"]),
    "a recipe value": ({"lr": -1}, ["lr: must be above 0", "-1"]),
    "more held out than there is": ({"held_out": 13}, ["holds 12 prompts", "13 are held out", "set held_out or batch"]),
    "no image": ({"data": "not-an-image.jsonl"}, ["words.txt", "not-an-image.jsonl", "is not a readable image"]),
    "an image that is gone": ({"data": "gone.jsonl"}, ["no such image", "b.png", "gone.jsonl"]),
    "a placeholder": ({"data": "placeholder.jsonl"}, ["<image>", "what is <image> here", "leave it out"]),
    "no data": ({"data": "nothing.jsonl"}, ["cannot read", "nothing.jsonl", "No such file"]),
    "data that is none": ({"data": "a.png"}, ["a.png:1", "is not a prompt", '{"image"']),
    "no model": ({"model": "a.png"}, ["a.png", "no model folder", "config.json"]),
}


@pytest.mark.parametrize(("given", "told"), CASES.values(), ids=CASES)
def test_wrong_inputs(place, tmp_path, capsys, given, told):
    assert train(place, tmp_path / "out", **given) == 2
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if not line.startswith("step ")]
    assert lines[0].startswith("prunekit: error: ") and len(lines) == 1, said
    assert all(piece in said for piece in told), said
    assert not list((tmp_path / "out").glob("*"))


def test_a_file_where_the_router_should_go(place, tmp_path, capsys):
    """Said before the model is loaded, so also for one that does not load."""
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert train(place, out) == 2
        said = capsys.readouterr().err
        assert f"'{out}' cannot hold a router" in said and "name another folder" in said
        assert "step" not in said


def test_a_folder_that_holds_a_router(place, tmp_path, capsys):
    assert train(place, tmp_path, steps=0) == 0
    before = (tmp_path / "router.safetensors").read_bytes()
    assert train(place, tmp_path, lr=0.1) == 2
    assert "holds a router already (name another folder, or use --restart)" in capsys.readouterr().err
    assert (tmp_path / "router.safetensors").read_bytes() == before


def test_a_training_that_diverges_stops(place, tmp_path, capsys):
    assert train(place, tmp_path, steps=4, lr=1e30, warmup=0, save_every=1) == 2
    said = capsys.readouterr().err
    assert "the gradient is not finite" in said and "set lr lower" in said
    assert not (tmp_path / "router.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": -1}, "seed: must be at least 0"), ({"seed": 2**31}, "seed: must be below 2147483648"),
        ({"alpha": -1.0}, "alpha: must be above 0"), ({"alpha": 0.0}, "alpha: must be above 0"),
        ({"sparsity": -1.0}, "sparsity: must be at least 0"), ({"bias": -1.0}, "bias: must be at least 0"),
        ({"least_gap": -1.0}, "least_gap: must be at least 0"),
    ],
)  # fmt: skip
def test_values_that_would_train_backwards(changes, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**changes)


def test_the_largest_seed_trains(place, tmp_path):
    assert train(place, tmp_path, seed=2**31 - 1) == 0
    with pytest.raises(InputError, match="seed: must be a whole number"):
        from prunekit.training.recipe import read_recipe

        read_recipe(None, ["seed=1.5"])
