"""Figures as PNG, HTML and JSON: what is drawn where, that nothing gets out of the page, and that schemas stay."""

from __future__ import annotations

import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import prunekit
from prunekit.errors import InputError
from prunekit.testing.tiny import tiny_inputs, tiny_llava
from prunekit.testing.tiny_families import tiny_batch, tiny_model
from prunekit.trace import Figure, Run, colours, figure_of, maps, pieces, png, save
from prunekit.trace.data import SCHEMA, data_of
from prunekit.trace.fates import Fate, Scores
from prunekit.trace.layer_bars import summary

STAGES = {
    "fastv": [{"use": "fastv", "at": 2, "keep": 0.25}, {"use": "skip_layers", "layers": [3]}],
    "pooled": [{"use": "pool", "keep": 0.25}, {"use": "vtw", "at": 4}],
    "dense": [{"use": "dense"}],
}
ATTACK = '<script>alert("x")</script> & "quotes"'


def runs(*names: str, images: tuple[int, ...] = (1,)) -> list[Run]:
    model, inputs = tiny_llava(), tiny_inputs(images=images)
    made = []
    for name in names:
        with prunekit.apply(model, {"name": name, "stages": STAGES[name]}, trace=True) as run:
            model(**inputs)
        assert run.trace is not None
        made.append(Run(run.trace, answer=ATTACK))
    return made


def picture(colour: str = "white", size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.new("RGB", size, colour)


def whole(images: list[Image.Image]) -> dict[str, Any]:
    """As a processor that squashes."""
    import numpy as np
    import torch

    squashed = [np.array(image.convert("RGB").resize((56, 56))) for image in images]
    return {"pixel_values": torch.from_numpy(np.stack(squashed)).permute(0, 3, 1, 2) / 255}


@pytest.fixture(scope="module")
def figure() -> Figure:
    return figure_of(runs("fastv", "pooled", "dense"), [picture()], prepare=whole, model="tiny", prompt=ATTACK)


class TestPng:
    def test_it_opens_and_has_the_size_of_its_columns(self, figure: Figure, tmp_path: Path) -> None:
        with Image.open(save(figure, tmp_path / "keep.png")) as drawn:
            drawn.load()
            width = 4 * png.PANEL + 3 * png.GAP + 2 * png.MARGIN  # the image and three pipelines
            assert drawn.format == "PNG" and drawn.mode == "RGB" and drawn.width == width
            assert drawn.height == png.page(figure).height + 2 * png.MARGIN

    def test_one_pipeline_is_as_wide_as_its_maps(self) -> None:
        alone = figure_of(runs("fastv"), [picture()], prepare=whole)
        assert png.draw(alone).width == 3 * png.PANEL + 2 * png.GAP + 2 * png.MARGIN  # image, keep map, scores

    def test_cells_look_as_their_fates_say(self, figure: Figure) -> None:
        """On a white image: kept tokens stay white, and in grey the fates get darker from kept to gone."""
        (surface,) = figure.surfaces
        stage = figure.columns[0].stages[0]
        drawn = Image.new("RGB", (120, 120))
        maps.keep_map(surface, stage, (120, 120)).paint(drawn, 0, 0)
        for token, (left, top, right, bottom) in maps.rectangles(surface, (120, 120)):
            assert (left, top, right, bottom) == (token % 4 * 30, token // 4 * 30, token % 4 * 30 + 29, top + 29)
            corner = drawn.getpixel((left + 3, top + 3))
            expected = colours.mixed((255, 255, 255), colours.NIGHT, colours.COVER[stage.fates[token]])
            assert corner == pytest.approx(expected, abs=1)
        greys = [255 - round(colours.COVER[fate] * 200) for fate in Fate]
        assert min(before - after for before, after in itertools.pairwise(greys)) >= 30

    def test_joined_tokens_are_outlined(self, figure: Figure) -> None:
        (surface,) = figure.surfaces
        stage = figure.columns[1].stages[0]
        drawn = Image.new("RGB", (120, 120))
        maps.keep_map(surface, stage, (120, 120)).paint(drawn, 0, 0)
        outlined = {
            token
            for token, (left, top, _, _) in maps.rectangles(surface, (120, 120))
            if drawn.getpixel((left, top)) == colours.JOIN
        }
        assert outlined == set(stage.trace.kept) == set(stage.anchors)

    def test_heat_follows_ranks(self) -> None:
        scores = Scores.of({0: 5.0, 1: -1.0, 2: 5.0, 3: 0.5})
        assert (scores.low, scores.middle, scores.high) == (-1.0, 5.0, 5.0)
        assert scores.ranks == {1: 0.0, 3: 0.5, 0: 1.0, 2: 1.0}
        assert Scores.of({4: 2.0}).ranks == {4: 0.0}
        brightness = [sum(colours.heat(step / 20)) for step in range(21)]
        assert brightness == sorted(brightness)

    def test_what_the_model_does_not_see_is_pale(self) -> None:
        def middle(images: list[Image.Image]) -> dict[str, Any]:
            return whole([image.crop((image.width // 4, 0, image.width * 3 // 4, image.height)) for image in images])

        cut = figure_of(runs("fastv"), [picture("black", (128, 64))], prepare=middle)
        (surface,) = cut.surfaces
        drawn = Image.new("RGB", (200, 100))
        maps.keep_map(surface, None, (200, 100)).paint(drawn, 0, 0)
        assert drawn.getpixel((100, 50)) == (0, 0, 0) and drawn.getpixel((10, 50)) != (0, 0, 0)
        boxes = [token["box"] for token in data_of(cut)["inputs"][0]["tokens"]]
        assert boxes[0] == pytest.approx([32, 0, 48, 16], abs=1) and boxes[15] == pytest.approx([80, 48, 96, 64], abs=1)

    def test_words_fit(self) -> None:
        words = pieces.text("a long line of many words " * 20, 100, most=3)
        assert words.width == 100 and words.height == 3 * round(13 * pieces.SPACING)
        assert pieces.text("unbreakable" * 30, 100).height == round(13 * pieces.SPACING)

    def test_one_that_is_too_large_is_refused(
        self, figure: Figure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(png, "MOST_PIXELS", 1000)
        with pytest.raises(InputError, match=r"pixels are too many \(write \.html"):
            save(figure, tmp_path / "keep.png")


class Page(HTMLParser):
    """Elements of a page, with their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def classes(self, name: str) -> int:
        return sum(name in (one.get("class") or "").split() for _, one in self.found)


class TestHtml:
    def test_everything_is_escaped_and_nothing_is_fetched(self, figure: Figure, tmp_path: Path) -> None:
        text = save(figure, tmp_path / "keep.html").read_text()
        page = Page(text)
        tags = {tag for tag, _ in page.found}
        assert not tags & {"script", "link", "iframe", "object", "img"} and "<script" not in text
        assert page.words.count(ATTACK) == 2 and any(f"answer: {ATTACK}" in words for words in page.words)
        assert set(re.findall(r"url\((.{5})", text)) == {"data:"} and "http" not in text.replace("http-equiv", "")
        assert not [name for _, one in page.found for name in one if name.startswith("on")]
        assert "default-src 'none'" in text and "prefers-color-scheme:dark" in text

    def test_each_token_is_told_at_each_stage(self, figure: Figure, tmp_path: Path) -> None:
        page = Page(save(figure, tmp_path / "keep.html").read_text())
        stages = [stage for column in figure.columns for stage in column.stages]
        fates = [fate for stage in stages for fate in stage.fates.values()]
        legend = 4
        assert page.classes("d") + page.classes("m") + page.classes("g") == sum(f is not Fate.KEPT for f in fates) + 3
        assert page.classes("k") == 16 + fates.count(Fate.KEPT) + legend - 3
        assert page.classes("h") == 16 and page.classes("skip") == 1
        assert any(re.fullmatch(r"token 5: (kept|dropped here|dropped), score \S+", words) for words in page.words)
        assert any(re.fullmatch(r"token \d+: merged into \d+", words) for words in page.words)

    def test_an_image_is_in_the_page_once(self, figure: Figure, tmp_path: Path) -> None:
        assert save(figure, tmp_path / "keep.html").read_text().count("data:image/png;base64,") == 1


class TestJson:
    KEYS = {
        "": ["schema", "model", "prompt", "sample", "inputs", "pipelines", "notes"],
        "inputs": ["kind", "width", "height", "tokens", "note"],
        "tokens": ["token", "box", "crop", "row", "column"],
        "pipelines": ["name", "sha", "answer", "stages", "layers", "report"],
        "stages": ["stage", "index", "site", "asked", "entered", "kept", "merged", "dropped", "scores"],
        "layers": ["layer", "prefill", "decode", "tokens", "visual"],
    }

    def test_the_schema_is_the_documented_one(self, figure: Figure, tmp_path: Path) -> None:
        """A key that changes makes SCHEMA grow, here and on the page."""
        data = json.loads(save(figure, tmp_path / "keep.json").read_text())
        assert data["schema"] == SCHEMA == 1
        page = (Path(__file__).parents[2] / "docs" / "trace.md").read_text(encoding="utf-8")
        column = data["pipelines"][0]
        some = {"": data, "inputs": data["inputs"][0], "tokens": data["inputs"][0]["tokens"][0], "pipelines": column,
                "stages": column["stages"][0], "layers": column["layers"][0]}  # fmt: skip
        for name, one in some.items():
            assert list(one) == self.KEYS[name], name
            section = page.partition("## JSON")[2].partition("\n## ")[0]
            assert all(f"`{key}`" in section for key in one), name

    def test_it_says_what_the_report_says(self, figure: Figure) -> None:
        data = data_of(figure)
        for column, made in zip(data["pipelines"], figure.columns, strict=True):
            events = made.report.events
            assert [tuple(stage["kept"]) for stage in column["stages"]] == [event.kept[0] for event in events]
            assert [layer["tokens"] for layer in column["layers"]] == list(made.report.layer_tokens[0])
        assert [layer["prefill"] for layer in data["pipelines"][0]["layers"]] == ["run"] * 3 + ["skip"] + ["run"] * 2
        assert [layer["visual"] for layer in data["pipelines"][0]["layers"]] == [16, 16, 4, 4, 4, 4]
        tokens = data["inputs"][0]["tokens"]
        assert tokens[6] == {"token": 6, "box": [32.0, 16.0, 48.0, 32.0], "crop": 0, "row": 1, "column": 2}
        assert summary(figure.columns[0].layers) == "layers: 5 run, skip 3"


class TestFigures:
    def test_a_row_of_a_batch(self) -> None:
        batch = runs("fastv", images=(1, 2))
        first = figure_of(batch, [picture()], prepare=whole, sample=0)
        second = figure_of(batch, [picture(), picture("grey")], prepare=whole, sample=1)
        assert [len(one.exhibits) for one in (first, second)] == [1, 2]
        assert [surface.title for surface in second.surfaces] == ["image 1", "image 2"]
        assert png.draw(second).height > 100

    def test_videos_without_and_with_frames(self, tmp_path: Path) -> None:
        model = tiny_model("qwen2_5_vl", layers=4)
        batch = tiny_batch(model, (("image", "video"),))
        with prunekit.apply(model, {"stages": [{"use": "fastv", "at": 2, "keep": 0.5}]}, trace=True) as run:
            model(**batch)
        assert run.trace is not None
        bare = figure_of([Run(run.trace)])
        frames = int(batch["video_grid_thw"][0, 0])
        assert len(bare.surfaces) == 1 + frames and bare.notes == ()
        shown = figure_of([Run(run.trace)], [picture(), [picture("red")] * 2 * frames])
        assert any("frames are drawn as if" in note for note in shown.notes)
        assert any("which part of the images" in note for note in shown.notes)
        for figure in (bare, shown):
            for ending in ("png", "html", "json"):
                save(figure, tmp_path / f"keep.{ending}")
        assert {token["box"] is None for token in data_of(shown)["inputs"][0]["tokens"]} == {True}

    def test_what_does_not_belong_together_is_refused(self) -> None:
        made = runs("fastv")
        with pytest.raises(InputError, match="at least one run"):
            figure_of([])
        with pytest.raises(InputError, match=r"no sample 1: the batch has 1"):
            figure_of(made, sample=1)
        with pytest.raises(InputError, match="sample 1 shows no image and no video"):
            figure_of(runs("fastv", images=(1, 0)), sample=1)
        with pytest.raises(InputError, match="different prompts"):
            figure_of([*made, *runs("fastv", images=(2,))])
        with pytest.raises(InputError, match="shows 1 images and 0 videos, but 2 and 0 are given"):
            figure_of(made, [picture(), picture()])
        with pytest.raises(InputError, match="but 0 and 1 are given"):
            figure_of(made, [[picture()]])
