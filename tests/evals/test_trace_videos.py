"""`prunekit trace --video`: a video file on models that take videos and on one that does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_checkpoint import picture, save
from video_models import clip, video_model

from prunekit import families, loading, video_files
from prunekit.cli import main, trace

ASKED = ("fastv-k2-r25", "--prompt", "w9 w12", "--max-new-tokens", 1)


@pytest.fixture
def film(tmp_path: Path) -> Path:
    return clip(tmp_path / "film.mp4", frames=12)


def run(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> tuple[str, str]:
    assert main.main(["trace", *map(str, words)]) == code
    out, err = capsys.readouterr()
    return out, err


def drawn(path: Path) -> Any:
    with Image.open(path) as image:
        return image.size


@pytest.mark.parametrize(("family", "kept"), [("qwen2_5_vl", 2), ("llava_onevision", 4)])
def test_each_frame_that_is_shown_has_a_map(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, film: Path, family: str,
    kept: int,
) -> None:  # fmt: skip
    """kept: maps of four frames; a tower that takes two frames together has one for both."""
    loaded = video_model(family)
    monkeypatch.setattr(trace, "load", lambda namespace: (loaded.model, loaded.processor))
    monkeypatch.setattr(loading, "load_shape", lambda *_: families.shape_of(loaded.model))
    targets = ("-o", tmp_path / "keep.json", "-o", tmp_path / "keep.png", "-o", tmp_path / "keep.html")
    picture(tmp_path / "a.png")
    shown = ("--video", film, "--frames", 4, "--image", tmp_path / "a.png")
    run(capsys, *ASKED, "--model", "any", *shown, *targets)
    data = json.loads((tmp_path / "keep.json").read_text())
    image, video = data["inputs"]
    assert (image["kind"], video["kind"]) == ("image", "video")
    assert (video["width"], video["height"]) == (64, 48)
    assert {one["crop"] for one in video["tokens"]} == set(range(kept))
    assert all(one["box"] is not None for one in video["tokens"] if one["row"] is not None)
    assert drawn(tmp_path / "keep.png")[0] > 300 and "video" in (tmp_path / "keep.html").read_text()


def test_the_frames_are_those_of_the_file(film: Path) -> None:
    from prunekit.video_files import Clip, Sampling

    frames = Clip(film, Sampling(3)).images()
    assert [one.size for one in frames] == [(64, 48)] * 3
    assert not np.array_equal(np.asarray(frames[0]), np.asarray(frames[-1]))


def test_a_model_that_takes_no_videos_gets_the_frames_as_images(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, film: Path
) -> None:
    model = save(tmp_path / "model", layers=4)
    out, _ = run(capsys, *ASKED, "--model", model, "--video", film, "--frames", 3, "--json")
    inputs = json.loads(out)["inputs"]
    assert [(one["kind"], one["width"], len(one["tokens"])) for one in inputs] == [("image", 64, 16)] * 3
    assert main.main(["run", *map(str, ASKED), "--model", str(model), "--video", str(film), "--frames", "2"]) == 0
    assert "visual tokens 32 -> 8" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--video", "no.mp4"], "no such video: 'no.mp4'"),
        (["--video", "text.mp4"], "video 'text.mp4' cannot be decoded"),
        ([], "the prompt shows no image (name one with --image or --video"),
    ],
)
def test_what_is_no_video(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.mp4").write_text("no video")
    out, err = run(capsys, *ASKED, "--model", save(tmp_path / "model", layers=4), *words, code=2)
    assert out == "" and said in err


def test_a_decoder_that_is_not_installed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, film: Path
) -> None:
    monkeypatch.setattr(video_files, "find_spec", lambda name: None)
    assert "pip install 'prunekit[video]'" in run(capsys, *ASKED, "--model", "micro", "--video", film, code=2)[1]
