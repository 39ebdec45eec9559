"""`prunekit trace`: what it writes, and what it says of input that it cannot take."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from tiny_checkpoint import picture, save

from prunekit.cli import main

ROOT = Path(__file__).parent.parent
FASTV = "stages: [{use: fastv, at: 2, keep: 0.25}]\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("model"), layers=4)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return picture(tmp_path / "image.png")


def run(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> tuple[str, str]:
    assert main.main(["trace", *map(str, arguments)]) == code
    out, err = capsys.readouterr()
    return out, err


def test_files_of_each_kind_and_pipelines_side_by_side(
    capsys: pytest.CaptureFixture[str], model: Path, image: Path, tmp_path: Path
) -> None:
    targets = [tmp_path / f"keep.{ending}" for ending in ("json", "png", "html")]
    small = tmp_path / "small"
    options = [word for path in targets for word in ("-o", path)] + ["--thumbnails", small]
    asked = ("--model", model, "--image", image, "--image", image, "--prompt", "w9 w12", "--max-new-tokens", 2)
    out, err = run(capsys, "fastv-k2-r25", "pool-r25", *asked, *options)
    thumbnails = [small / "fastv-k2-r25.webp", small / "pool-r25.webp"]
    assert err == "" and out.splitlines() == [f"wrote {path}" for path in [*targets, *thumbnails]]
    for path in thumbnails:
        with Image.open(path) as drawn:
            assert drawn.width == 2 * 60 + 4 and drawn.height < 130  # two images, and the layers
    data = json.loads(targets[0].read_text())
    assert [one["name"] for one in data["pipelines"]] == ["fastv-k2-r25", "pool-r25"]
    assert [len(one["tokens"]) for one in data["inputs"]] == [16, 16] and data["prompt"] == "w9 w12"
    # 20 x 14 pixels become 80 x 56, of which the middle 56 columns are seen: 14 of the 20 pixels.
    assert data["inputs"][0]["tokens"][0]["box"] == pytest.approx([3, 0, 6.5, 3.5], abs=0.3)
    assert (data["inputs"][0]["width"], data["inputs"][0]["height"]) == (20, 14)
    assert [len(one["stages"][0]["kept"]) for one in data["pipelines"]] == [8, 8]
    with Image.open(targets[1]) as drawn:
        assert drawn.width > 800
    assert "pool-r25" in targets[2].read_text()


def test_words_and_json_on_stdout(capsys: pytest.CaptureFixture[str], model: Path, image: Path) -> None:
    asked = ("fastv-k2-r25", "--model", model, "--image", image, "--prompt", "w9", "--max-new-tokens", 1)
    out, _ = run(capsys, *asked, "stages.0.keep=0.5")
    assert "  fastv at layer 2: 8 of 16 kept, 8 dropped\n  layers: 4 run\n" in out and "-o keep.png" in out
    assert json.loads(run(capsys, *asked, "--json")[0])["schema"] == 1


def test_a_prompt_of_a_source(capsys: pytest.CaptureFixture[str], model: Path, image: Path, tmp_path: Path) -> None:
    rows = [{"image": image.name, "prompt": "w9"}, {"image": [image.name, image.name], "prompt": "w12"}]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = ("dense", "--model", model, "--data", tmp_path / "data.jsonl", "--json", "--max-new-tokens", 1)
    data = json.loads(run(capsys, *asked, "--number", 1)[0])
    assert (data["prompt"], len(data["inputs"]), data["pipelines"][0]["stages"]) == ("w12", 2, [])
    assert json.loads(run(capsys, *asked, "--prompt", "w5")[0])["prompt"] == "w5"


class TestRefused:
    """Each says what is wrong and what to do, before the weights are loaded where that is possible."""

    @pytest.mark.parametrize(
        "words, said",
        [
            (["fastv-k2-r25", "--prompt", "w9"], "the prompt shows no image (name one with --image"),
            (["fastv-k2-r25", "--image", "image.png"], "nothing is asked (ask something with --prompt"),
            (["fastv-k2-r25", "--image", "image.png", "--prompt", " "], "the prompt is empty"),
            (["fastv-k2-r25", "--image", "no.png", "--prompt", "w9"], "no such image: 'no.png'"),
            (["fastv-k2-r25", "--image", "text.png", "--prompt", "w9"], "'text.png' is not a readable image"),
            (["fastv-k2-r25", "--image", "image.png", "--prompt", "w9", "-o", "a.gif"], "(end it with .json, .png"),
            (["fastv-k2-r25", "--image", "image.png", "--prompt", "w9", "-o", "keep"], "'keep' is not a kind of file"),
            (["fastv-k2-r25", "--image", "image.png", "--prompt", "w9", "-o", "no/a.png"], "no directory 'no'"),
            (["fastv-k2-r25", "--image", "image.png", "--prompt", "w9", "-o", "d.png"], "'d.png' is a directory"),
            (["fastv-k2", "--image", "image.png", "--prompt", "w9"], "did you mean 'fastv-k2-r25"),
            (["empty.yaml", "--image", "image.png", "--prompt", "w9"], "empty.yaml:1:9: stages"),
            (["deep.yaml", "--image", "image.png", "--prompt", "w9"], "deep.yaml:1:"),
            (["stages.0.keep=1", "--image", "image.png", "--prompt", "w9"], "name a pipeline"),
            (["dense", "--data", "micro-scenes", "--number", "-1"], "--number -1: 'micro-scenes' has prompts 0 to"),
            (["dense", "--data", "nowhere"], "unknown data 'nowhere'"),
        ],
    )  # fmt: skip
    def test_wrong_input(
        self, capsys: pytest.CaptureFixture[str], model: Path, image: Path, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch, words: list[str], said: str,
    ) -> None:  # fmt: skip
        monkeypatch.chdir(tmp_path)
        (tmp_path / "text.png").write_text("no image")
        (tmp_path / "d.png").mkdir()
        (tmp_path / "empty.yaml").write_text("stages: []\n")
        (tmp_path / "deep.yaml").write_text("stages: [{use: fastv, at: 40, keep: 0.5}]\n")
        out, err = run(capsys, *words, "--model", model, code=2)
        assert out == "" and said in err

    def test_a_model_without_images(self, capsys: pytest.CaptureFixture[str], image: Path, tmp_path: Path) -> None:
        (tmp_path / "text").mkdir()
        (tmp_path / "text" / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 1}')
        asked = ("--model", tmp_path / "text", "--image", image, "--prompt", "w9")
        said = run(capsys, "fastv-k2-r25", *asked, code=2)[1]
        assert "is it a complete vision-language model of transformers?" in said

    def test_a_target_that_cannot_be_written(
        self, capsys: pytest.CaptureFixture[str], model: Path, image: Path
    ) -> None:
        asked = ("dense", "--model", model, "--image", image, "--prompt", "w9", "--max-new-tokens", 1)
        err = run(capsys, *asked, "-o", "/proc/keep.json", code=2)[1]
        assert "'/proc/keep.json' cannot be written" in err
