"""Reading pipeline files: places, defaults, merging, overrides, and that nothing but a SpecError ever comes out."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from prunekit.errors import SpecError, Where
from prunekit.spec import schema
from prunekit.strategy.sites import ENCODER, Keep, Site

TEXT = """\
# two stages
name: both
description: a test
stages:
  - use: fastv
    at: 2
    keep: 0.25
  - {use: skip_layers, layers: [3, 5]}
"""


def write(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def faults_of(source: Any, overrides: tuple[str, ...] = ()) -> list[str]:
    with pytest.raises(SpecError) as caught:
        schema.load(source, overrides)
    return [str(fault) for fault in caught.value.faults]


def test_a_file_with_the_place_of_every_value(tmp_path: Path) -> None:
    path = write(tmp_path, "both.yaml", TEXT)
    read = schema.load(path)
    assert (read.name, read.description, read.source) == ("both", "a test", str(path))
    first, second = read.stages
    assert (first.use, first.sites, first.keeps, first.options) == ("fastv", (Site(2),), (Keep(0.25),), {})
    assert (second.use, second.sites, second.keeps, second.options) == ("skip_layers", None, None, {"layers": [3, 5]})
    assert first.where == Where(str(path), 5, 5)
    assert first.keys["keep"] == Where(str(path), 7, 11)
    assert second.keys["layers[1]"] == Where(str(path), 8, 36)


def test_path_text_json_and_dict_say_the_same(tmp_path: Path) -> None:
    data = {
        "name": "both",
        "stages": [{"use": "fastv", "at": 2, "keep": 0.25}, {"use": "skip_layers", "layers": (3, 5)}],
    }
    line = "name: both, stages: [{use: fastv, at: 2, keep: 0.25}, {use: skip_layers, layers: [3, 5]}]"
    written = [TEXT, json.dumps(data), json.dumps(data, separators=(",", ":")), f"{{{line}}}"]
    sources = [write(tmp_path, "both.yaml", TEXT), str(tmp_path / "both.yaml"), *written, data]
    read = [schema.load(source) for source in sources]
    said = [[(one.use, one.sites, one.keeps, one.options) for one in each.stages] for each in read]
    assert all(one == said[0] for one in said)
    assert [each.source for each in read[2:]] == ["<inline>"] * 4 + ["<dict>"]
    assert read[-1].stages[0].where is None


def test_one_line_of_yaml_is_no_path() -> None:
    assert schema.load("stages: [{use: blind}]").source == "<inline>"


@pytest.mark.parametrize(
    ("file", "name"),
    [("fastv.yaml", "fastv"), ("my  pipe(1).yml", "my-pipe-1"), ("..yaml", "pipeline"), ("\u00e9.yaml", "pipeline")],
)
def test_the_name_defaults_to_the_file(tmp_path: Path, file: str, name: str) -> None:
    assert schema.load(write(tmp_path, file, "stages:\n  - use: x\n")).name == name


def test_a_bom_and_windows_line_ends_are_fine(tmp_path: Path) -> None:
    path = write(tmp_path, "w.yaml", b"\xef\xbb\xbfstages:\r\n  - use: x\r\n    at: encoder\r\n")
    assert schema.load(path).stages[0].sites == (ENCODER,)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("yes", "yes"),
        ("NO", "NO"),
        ("on", "on"),
        ("true", True),
        ("False", False),
        ("~", None),
        ("null", None),
        ("010", 10),
        ("-3", -3),
        ("+3", 3),
        ("0x10", "0x10"),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("2020-01-01", "2020-01-01"),
        ("1e3", 1000.0),
        ("1.", 1.0),
        (".5", 0.5),
        ("-.inf", -math.inf),
        ("'3'", "3"),
        ('"true"', "true"),
        ("''", ""),
        ("[1, a]", [1, "a"]),
        ("{a: 1}", {"a": 1}),
        ("9223372036854775807", 2**63 - 1),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    read = schema.load(f"stages:\n  - use: x\n    value: {text}\n").stages[0].options["value"]
    assert (read, type(read)) == (value, type(value))


def test_not_a_number_is_read_as_one() -> None:
    assert math.isnan(schema.load("stages:\n  - use: x\n    value: .nan\n").stages[0].options["value"])


def test_keep_forms() -> None:
    read = schema.load("stages: [{use: a, keep: 1}, {use: a, keep_tokens: 64}, {use: a, keep: .5, keep_of: current}]\n")
    assert [stage.keeps for stage in read.stages] == [(Keep(1.0),), (Keep(tokens=64),), (Keep(0.5, of="current"),)]


def test_extends_merges_left_to_right_and_keeps_places(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path, "a.yaml", "name: a\ndescription: of a\nstages: [{use: one}]\n")
    b = write(tmp_path, "sub/b.yaml", "extends: ../a.yaml\nstages:\n  - use: two\n    at: 3\n")
    c = write(tmp_path, "c.yaml", "extends: [a.yaml, sub/b.yaml]\n")
    read = schema.load(c)
    assert (read.name, read.description, [stage.use for stage in read.stages]) == ("c", "of a", ["two"])
    where = read.stages[0].keys["at"]
    assert where is not None and Path(where.file).resolve() == b.resolve() and (where.line, where.col) == (4, 9)
    assert schema.load(write(tmp_path, "d.yaml", "extends: [sub/b.yaml, a.yaml]\n")).stages[0].use == "one"


def test_two_ways_to_one_file_are_no_circle(tmp_path: Path) -> None:
    write(tmp_path, "base.yaml", "stages: [{use: one}]\n")
    write(tmp_path, "l.yaml", "extends: base.yaml\n")
    write(tmp_path, "r.yaml", "extends: base.yaml\n")
    assert schema.load(write(tmp_path, "top.yaml", "extends: [l.yaml, r.yaml]\n")).stages[0].use == "one"


def test_extends_that_multiplies_is_stopped(tmp_path: Path) -> None:
    write(tmp_path, "p0.yaml", "stages: [{use: one}]\n")
    for level in range(1, 40):
        write(tmp_path, f"p{level}.yaml", f"extends: [p{level - 1}.yaml, p{level - 1}.yaml]\n")
    assert any("more than 64 files" in fault for fault in faults_of(tmp_path / "p39.yaml"))


def test_overrides_come_last_and_know_their_place() -> None:
    read = schema.load(
        TEXT, ["stages[0].keep=0.5", "stages.0.at=encoder", "stages[1].layers=[4]", "name=other", "stages[0].x=1"]
    )
    assert read.name == "other"
    assert (read.stages[0].keeps, read.stages[0].sites) == ((Keep(0.5),), (ENCODER,))
    assert (read.stages[1].options, read.stages[0].options) == ({"layers": [4]}, {"x": 1})
    assert read.stages[0].keys["keep"] == Where("override 1", 1, 16)
    assert schema.load(TEXT, ["stages[0].keep=null", "stages[0].keep_tokens=9"]).stages[0].keeps == (Keep(tokens=9),)
    assert schema.load(TEXT, ["stages[1].layers[0]=7"]).stages[1].options == {"layers": [7, 5]}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("keep", "override 1:1:1: 'keep' is not key=value (write it as stages[0].keep=0.3)"),
        ("=3", "override 1:1:1: '=3' is not key=value"),
        ("stages[-1].at=3", "is not key=value"),
        (
            "stages[7].at=3",
            "override 1:1:1: stages[7].at: there is no '7' to set here; it has 2 entries, counted from 0",
        ),
        ("stages[0].at.x=3", "there is no 'x' to set here"),
        ("stages.x=3", "there is no 'x' to set here"),
        ("stages[0].keep=[1", "override 1:1:3: not YAML"),
        ("stages[0].keep=*a", "alias '*a' is not allowed"),
        ("stages[0].keep=7", "override 1:1:16: stages[0].keep: must be a fraction in (0, 1], not 7"),
        ("nmae=x", "override 1:1:1: nmae: unknown key (did you mean 'name'?"),
    ],
)
def test_bad_overrides(override: str, said: str) -> None:
    found = faults_of(TEXT, (override,))
    assert len(found) == 1 and said in found[0]


def test_every_fault_is_told_at_once() -> None:
    found = faults_of("nmae: x\nstages:\n  - at: here\n  - use: 3\n  - use: a\n    keep: 0\n    keep_of: all\n")
    assert [fault.split(": ")[:2] for fault in found] == [
        ["<inline>:1:1", "nmae"],
        ["<inline>:3:5", "stages[0].use"],
        ["<inline>:3:9", "stages[0].at"],
        ["<inline>:4:10", "stages[1].use"],
        ["<inline>:7:14", "stages[2].keep_of"],
        ["<inline>:6:11", "stages[2].keep"],
    ]


@pytest.mark.parametrize(
    "source",
    [{"stages": [{"use": object()}]}, {"stages": [{"use": "a", "x": {3: 4}}]}, {1: 2, "stages": []}, {"stages": 2**70}],
    ids=["object", "key", "top-key", "number"],
)
def test_a_dict_that_no_file_could_hold(source: dict[Any, Any]) -> None:
    assert faults_of(source)


@pytest.mark.parametrize(
    "source", [None, 3, [{"use": "dense"}], b"stages: []"], ids=["none", "number", "list", "bytes"]
)
def test_what_is_no_source(source: Any) -> None:
    (fault,) = faults_of(source)
    assert "a pipeline is a path, a dict or YAML text, not " in fault


def test_a_dict_that_holds_itself() -> None:
    stages: list[Any] = []
    stages.append(stages)
    assert any("levels deep" in fault for fault in faults_of({"stages": stages}))


def test_torch_stays_out() -> None:
    code = f"import sys; from prunekit.spec import schema; schema.load({TEXT!r}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def only_spec_errors(source: Any, overrides: list[str]) -> None:
    try:
        schema.load(source, overrides)
    except SpecError as error:
        assert error.faults
        str(error)


FUZZ = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
# Pieces that YAML gives a meaning to, so that random text reaches deep into the reader.
PIECES = st.sampled_from(
    [
        "stages:",
        "use",
        "at",
        "keep",
        "keep_tokens",
        "keep_of",
        "keep_layers",
        "positions: ",
        "extends:",
        "name:",
        "- ",
        ": ",
        "\n",
        "\n  ",
        "\n    ",
        "[",
        "]",
        "{",
        "}",
        ",",
        "&a ",
        "*a",
        "!!python/name:os.system ",
        "!x ",
        "<<: ",
        "? ",
        "|\n",
        ">\n",
        "'",
        '"',
        "\\U00110000",
        "#",
        "\t",
        "%YAML 1.1\n---\n",
        "%YAML 99999999999999999999.1\n",
        "---\n",
        "...\n",
        "0.5",
        "-1",
        ".nan",
        ".inf",
        "9" * 30,
        "9" * 5000,
        "true",
        "~",
        "encoder",
        "vision.3",
        "2.mid",
        "2020-99-99",
        "\x00",
        "\ud7ff",
        "\u2028",
        "=",
        "\x85",
        "\ufeff",
    ]
)


@FUZZ
@given(st.one_of(st.text(), st.lists(PIECES, max_size=40).map("".join)).map(lambda text: text + "\n"))
@example("[" * 5000 + "\n")
@example("{" * 200 + "\n")
@example('a: "\\U00110000"\n')
@example("\ud800\n")
@example("a: &x [1]\nb: &x [2]\nc: *x\n")
def test_any_text(text: str) -> None:
    only_spec_errors(text, [])


@FUZZ
@given(st.one_of(st.binary(max_size=200), st.lists(PIECES, max_size=20).map("".join).map(lambda t: t.encode("utf-16"))))
def test_any_bytes(tmp_path: Path, raw: bytes) -> None:
    only_spec_errors(write(tmp_path, "fuzz.yaml", raw), [])


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["encoder", "fastv"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["use", "at", "keep", "x"]), inner),
    max_leaves=8,
)
TREE = st.dictionaries(st.sampled_from(["name", "stages", "extends", "description", "positions", "z"]), PLAIN)
OVERRIDE = st.one_of(
    st.text(max_size=12), st.builds("{}={}".format, st.sampled_from(["stages[0].keep", "name"]), st.text())
)


@FUZZ
@given(
    TREE | st.builds(dict, stages=st.lists(st.dictionaries(st.sampled_from(schema.STAGE_KEYS), PLAIN))),
    st.lists(OVERRIDE),
)
def test_any_data_and_any_override(tree: dict[str, Any], overrides: list[str]) -> None:
    only_spec_errors(tree, overrides)


@given(st.integers(1, 1000), st.integers(1, 4096), st.integers(0, 4096))
def test_keep_rounds_half_up_exactly(thousandths: int, original: int, current: int) -> None:
    exact = math.floor(Fraction(thousandths, 1000) * original + Fraction(1, 2))
    expected = min(max(exact, 1), current)
    assert Keep(thousandths / 1000).count(original, current) == expected
    assert Keep(thousandths / 1000, of="current").count(original, current) == (
        min(max(math.floor(Fraction(thousandths, 1000) * current + Fraction(1, 2)), 1), current)
    )


@given(st.integers(1, 5000), st.integers(1, 4096), st.integers(0, 4096))
def test_keep_tokens_is_absolute(tokens: int, original: int, current: int) -> None:
    assert Keep(tokens=tokens).count(original, current) == min(tokens, current)
