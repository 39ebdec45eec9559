"""The page, read as a browser reads it: nothing from outside, nothing unescaped, usable by keyboard."""

import base64
import dataclasses
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest
from board_cells import cell, complete, dense, under
from PIL import Image
from prunekit_evals.compare import clustered
from prunekit_evals.leaderboard import board, bundle, charts, page, pictures, points
from prunekit_evals.run.results import Executed

from prunekit.errors import InputError

HOSTILE = """</script><script>alert(1)</script><img src=x onerror=alert(2)>"'&{{ 7 * 7 }}"""
VOID = {"meta", "input", "br", "img", "link", "hr"}


@dataclasses.dataclass
class Element:
    tag: str
    attributes: dict
    parent: "Element | None"
    text: str = ""

    def above(self, tag):
        one = self.parent
        while one is not None and one.tag != tag:
            one = one.parent
        return one


class Reader(HTMLParser):
    """All elements with their own text. Raises for what is not closed in order."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.open = [], None
        self.feed(html)
        self.close()
        assert self.open is None

    def handle_starttag(self, tag, attrs):
        self.elements.append(Element(tag, dict(attrs), self.open))
        if tag not in VOID:
            self.open = self.elements[-1]

    def handle_endtag(self, tag):
        assert self.open is not None and self.open.tag == tag, (tag, self.open)
        self.open = self.open.parent

    def handle_data(self, data):
        if self.open is not None:
            self.open.text += data

    def all(self, tag):
        return [one for one in self.elements if one.tag == tag]


@pytest.fixture
def light(monkeypatch):
    """Without the megabyte that draws."""
    monkeypatch.setattr(bundle, "bundle", lambda: "window.vegaEmbed = null;")


def read(*cells):
    return Reader(page.html(board.of_cells(cells)))


def test_the_whole_page_is_small_and_needs_nothing_from_outside(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    html = page.html(board.of_cells(complete("pope", "gqa")))
    assert len(html.encode()) < 1_100_000 < page.LIMIT
    seen = Reader(html)
    for one in seen.elements:
        for name, value in one.attributes.items():
            assert not name.startswith("on"), (one.tag, name)
            if name in ("src", "href", "action", "srcset", "data", "poster"):
                assert value.startswith("#"), (one.tag, name, value)
    assert not {"link", "img", "iframe", "object", "embed", "base"} & {one.tag for one in seen.elements}
    assert "url(" not in "".join(one.text for one in seen.all("style"))
    (policy,) = [one.attributes["content"] for one in seen.all("meta") if "http-equiv" in one.attributes]
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe-eval" not in policy
    scripts = [one.text for one in seen.all("script") if "type" not in one.attributes]
    hashes = [base64.b64encode(hashlib.sha256(one.encode()).digest()).decode() for one in scripts]
    assert re.findall(r"'sha256-([^']+)'", policy) == hashes and len(scripts) == 2
    assert "vegaEmbed" in scripts[0]
    monkeypatch.setattr("vl_convert.javascript_bundle", lambda: pytest.fail("made again"))
    assert page.html(board.of_cells(complete("pope", "gqa"))) == html  # and it is kept
    assert [one.suffix for one in (tmp_path / "prunekit").iterdir()] == [".js"]


def test_a_cache_that_cannot_be_written_to_costs_nothing_but_time(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("vl_convert.javascript_bundle", lambda: "made")
    assert bundle.bundle() == bundle.bundle() == "made"


def test_for_phones_and_the_dark(light):
    seen = read(*complete("pope"))
    named = {one.attributes.get("name"): one.attributes.get("content") for one in seen.all("meta")}
    assert named["viewport"] == "width=device-width, initial-scale=1" and named["color-scheme"] == "light dark"
    (style,) = [one.text for one in seen.all("style")]
    assert "@media (prefers-color-scheme: dark)" in style and "@media (max-width:" in style
    assert all(one.above("div").attributes["class"] == "wide" for one in seen.all("table"))  # which scrolls by itself
    assert seen.all("html")[0].attributes["lang"] == "en"


def test_every_row_is_there_with_all_that_stands_behind_it(light):
    made = board.of_cells(complete("pope", "gqa"))
    seen = Reader(page.html(made))
    names = [entry.row.pipeline for entry in made.sections[0].entries]
    rows = [one for one in seen.all("tr") if "data-find" in one.attributes]
    assert [one.attributes["data-find"] for one in rows] == names * 2  # the ranking, and each task
    assert [one.text for one in seen.all("summary")] == names
    links = [one.attributes["href"].removeprefix("#") for one in seen.all("a") if one.above("tr")]
    assert set(links) == {one.attributes["id"] for one in seen.all("details")}
    shown = "\n".join(one.text for one in seen.all("pre"))
    for entry in made.sections[0].entries:
        assert all(run.yaml.strip() in shown and run.command in shown for run in entry.runs)
    facts = {one.text for one in (*seen.all("dd"), *seen.all("td"))}
    assert {"abc", "float32", "d1", "cpu", "sha-ours", "code", "A", made.sections[0].entries[0].cells[0].id} <= facts
    assert sum("baseline" in (one.attributes.get("class") or "") for one in rows) == 2 * 4


def test_by_keyboard(light):
    seen = read(*complete("pope"))
    ids = [one.attributes["id"] for one in seen.elements if "id" in one.attributes]
    assert len(ids) == len(set(ids))
    heads = [one for one in seen.all("th") if "aria-sort" in one.attributes]
    assert heads and {one.attributes["aria-sort"] for one in heads} == {"none"}
    buttons = [one for one in seen.all("button") if one.above("th") in heads]
    assert len(buttons) == len(heads) and all(one.attributes["type"] == "button" for one in buttons)
    for one in seen.elements:
        assert int(one.attributes.get("tabindex") or 0) == 0  # in the order of the page
        if (one.attributes.get("class") or "") == "wide":
            assert one.attributes["tabindex"] == "0" and one.attributes["role"] == "region"
            assert one.attributes["aria-label"]
    for one in (*seen.all("input"), *seen.all("select")):
        assert one.above("label") is not None
    assert all(one.attributes["aria-label"] for one in seen.elements if one.attributes.get("role") == "img")
    assert [one.attributes.get("aria-live") for one in seen.all("output")] == ["polite"]
    assert seen.all("a")[0].attributes["href"].removeprefix("#") in ids  # past the filters


def test_whatever_came_from_a_file_is_escaped(light):
    bad = cell(HOSTILE, HOSTILE, machine=HOSTILE, conditions=under(
        model=HOSTILE, identity=HOSTILE, data=HOSTILE, system_prompt=HOSTILE, versions={HOSTILE: HOSTILE}))  # fmt: skip
    bad = dataclasses.replace(
        bad, notes=(HOSTILE,), metrics={HOSTILE: 1.0}, task_version=HOSTILE, created=HOSTILE,
        pipeline=dataclasses.replace(bad.pipeline, sha=HOSTILE, code=HOSTILE),
    )  # fmt: skip
    broken = dataclasses.replace(bad, task="gqa", label="gqa", status="failed", error=HOSTILE, questions=())
    html = page.html(board.of_cells([bad, broken, dense(created="0")]))
    seen, clean = Reader(html), read(*complete("pope"))
    assert {one.tag for one in seen.elements} <= {one.tag for one in clean.elements} | {"li", "strong"}
    assert len(seen.all("script")) == 2 + 2 and html.count("<script") == 4
    assert "49" not in "".join(one.text for one in seen.all("summary"))
    assert HOSTILE in [one.text for one in seen.all("summary")]
    assert f"{HOSTILE} on gqa failed: {HOSTILE}" in [one.text for one in seen.all("li")]
    data = [json.loads(one.text) for one in seen.all("script") if one.attributes.get("type") == "application/json"]
    assert HOSTILE in {one["pipeline"] for each in data for one in each["data"]}


def test_a_script_ends_where_the_page_ends_it(monkeypatch):
    monkeypatch.setattr(bundle, "bundle", lambda: 'x = "</script><!--";\r\ny')
    seen = read(dense())
    assert [one.text for one in seen.all("script")][1] == 'x = "<\\/script><\\!--";\ny'


def test_several_conditions_are_said_not_to_be_comparable(light):
    seen = read(dense(), dense(conditions=under(dtype="float16")))
    words = " ".join("".join(one.text for one in seen.elements).split())
    assert "not comparable" in words and {"float16", "float32"} <= {one.text for one in seen.all("code")}
    assert len(seen.all("section")) == 2
    assert not any("apart" in (one.attributes.get("class") or "") for one in read(dense()).elements)


def test_a_missing_baseline_is_said_with_its_command(light):
    seen = read(dense(), cell("ours"))
    assert [one.text for one in seen.all("strong")] == ["random", "pool", "downsample"]
    assert any(one.text.startswith("prunekit eval downsample-half --model org/model") for one in seen.all("code"))


def test_rows_without_scores_times_or_costs_have_their_place(light):
    bare = dataclasses.replace(cell("bare"), saved=None, timing=None)
    silent = dataclasses.replace(cell("silent"), questions=())
    seen = read(dense(), bare, silent)
    rows = [one.attributes for one in seen.all("tr") if "data-find" in one.attributes]
    assert {one["data-find"]: one["data-flops"] for one in rows} == {"dense": "1.0", "bare": "", "silent": "0.5"}
    assert read(silent).all("script")[-1].text  # nothing to plot at all


def test_the_plots_draw():
    import vl_convert

    (section,) = board.of_cells(complete("pope", "gqa")).sections
    for axis in points.axes(section):
        document = charts.pareto(axis, points.views(section))
        assert "$schema" not in document
        document = {**document, "width": 400, "datasets": {charts.DATA: points.of_section(section)}}
        drawn = vl_convert.vegalite_to_svg(document)
        assert axis.title in drawn and drawn.count('aria-roledescription="point"') == 6
        assert drawn.count('aria-roledescription="rule mark"') >= 6 and "currentColor" in drawn


def test_a_thousand_cells_are_judged_once_and_fit(light, monkeypatch):
    """`docs/leaderboard.md` has how long that takes."""
    calls = []

    def estimate(columns, mixes):
        calls.append((len(columns), len(mixes)))
        return usual(columns, mixes, resamples=199)

    usual = clustered.estimate
    monkeypatch.setattr(clustered, "estimate", estimate)
    tasks = [f"task{number}" for number in range(10)]
    cells = [dense(task) for task in tasks]
    cells += [cell(f"method-{n}", task, flops=0.1 + n / 200) for n in range(99) for task in tasks]
    html = page.html(board.of_cells(cells))
    assert len(cells) == 1000
    assert calls == [(1000, 1000 + 100 + 99)]  # accuracies, averages, differences to dense: all on the same draws
    rows = [one for one in Reader(html).all("tr") if "data-find" in one.attributes]
    assert len(rows) == 200
    assert len(html.encode()) + 900_000 < page.LIMIT


def test_keep_maps_stand_by_the_rows_that_they_show(light, tmp_path):
    for name, kind in (("ours", "webp"), ("theirs", "png"), ("nobody", "webp")):
        Image.new("RGB", (120, 160), "teal").save(tmp_path / f"{name}.{kind}")
    (tmp_path / "random-r11.webp").write_bytes(b"RIFF")
    (tmp_path / "<x>.svg").write_text("<svg/>")
    (tmp_path / "pool-r11.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(pictures.LARGEST))
    made = pictures.read(tmp_path)
    assert sorted(made.of) == ["nobody", "ours", "theirs"]
    assert [one.path.name for one in made.skipped] == ["<x>.svg", "pool-r11.png", "random-r11.webp"]
    seen = Reader(page.html(board.of_cells(complete("pope")), made.of))
    shown = seen.all("img")
    assert [one.attributes["alt"] for one in shown] == ["Keep map of theirs", "Keep map of ours"]
    assert all(one.attributes["src"].startswith("data:image/") for one in shown)
    assert [one.above("figure").attributes["data-find"] for one in shown] == ["theirs", "ours"]
    with pytest.raises(InputError, match="prunekit trace"):
        pictures.read(tmp_path / "nowhere")


def test_a_cell_says_what_it_executed_and_what_went_wrong():
    told = page.cell_facts(cell("p"))
    assert (told["tokens entering layers"], told["flags"]) == ("", "")
    executed = Executed((180.0, 180.0, 72.5), 3.0, off_budget=4)
    told = page.cell_facts(dataclasses.replace(cell("p"), executed=executed, empty=2, unsound=1))
    assert told["tokens entering layers"] == "180 ×2, 72.5 ×1"
    assert told["flags"] == "2 empty, 1 not finite, 4 off budget"
